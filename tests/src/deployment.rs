//! Colloquy on the local Kubernetes: charts installed, a model applied and awaited. What the
//! end-to-end test and the demonstration have in common.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt;
use kube::api::{Api, DynamicObject};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use crate::client::Client;
use crate::cluster::{Cluster, Look, describe_pod, documents, kind, repository, tool, wait};
use crate::progress::Progress;

/// Where the operator lives.
pub const OPERATOR_NAMESPACE: &str = "colloquy-system";

/// How long a model may take to become ready: an image volume is mounted, weights are read, a volume
/// is made, on a machine that may be compiling beside it.
const READY_DURATION_MAX: Duration = Duration::from_mins(4);

/// A model applied to the cluster.
pub struct Deployment {
    cluster: Cluster,
    namespace: String,
    model: Value,
}

/// Installs the CRDs and the operator by their charts, as the README tells people to.
pub fn install_charts(progress: &mut Progress) -> anyhow::Result<()> {
    progress.say("installing the charts colloquy-crds and colloquy");
    let charts = repository().join("charts");
    let install = |release: &str| {
        let mut helm = tool("helm");
        helm.args(["upgrade", "--install", release]).arg(charts.join(release));
        helm.args(["--namespace", OPERATOR_NAMESPACE, "--create-namespace"]);
        helm.args(["--wait", "--timeout", "3m"]);
        helm
    };
    run(&mut install("colloquy-crds"))?;
    run(&mut install("colloquy"))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The kind that Colloquy adds to Kubernetes.
pub fn conversation_model() -> GroupVersionKind {
    kind("colloquy.dev", "v1alpha1", "ConversationModel")
}

impl Deployment {
    /// The model of `examples/smollm2.yaml`, in `namespace`, which enforces the "restricted" standard.
    pub async fn of_example(cluster: Cluster, namespace: &str) -> anyhow::Result<Self> {
        let path = repository().join("examples/smollm2.yaml");
        let mut model = documents(&path)?
            .into_iter()
            .find(|document| document["kind"] == "ConversationModel")
            .with_context(|| format!("{} holds no ConversationModel", path.display()))?;
        model["metadata"]["namespace"] = json!(namespace);
        cluster
            .apply(&json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": namespace,
                    "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
                },
            }))
            .await?;
        Ok(Self { cluster, namespace: namespace.to_owned(), model })
    }

    /// Where the model is.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The model as it was applied last.
    pub fn model(&self) -> &Value {
        &self.model
    }

    /// Name of the `ConversationModel` and of its service.
    pub fn name(&self) -> &str {
        self.model["metadata"]["name"].as_str().unwrap_or_default()
    }

    /// Name of the first replica's pod.
    pub fn pod_name(&self) -> String {
        format!("{}-0", self.name())
    }

    /// Applies the model.
    pub async fn apply(&self) -> anyhow::Result<()> {
        self.cluster.apply(&self.model).await.map(drop)
    }

    /// Changes the model and applies it.
    pub async fn change(&mut self, change: impl FnOnce(&mut Value)) -> anyhow::Result<()> {
        change(&mut self.model["spec"]);
        self.apply().await
    }

    async fn models(&self) -> anyhow::Result<Api<DynamicObject>> {
        self.cluster.api(&conversation_model(), &self.namespace).await
    }

    /// Deletes the model; false when there is none.
    pub async fn delete(&self) -> anyhow::Result<bool> {
        let models = self.models().await?;
        if models.get_opt(self.name()).await?.is_none() {
            return Ok(false);
        }
        models.delete(self.name(), &kube::api::DeleteParams::default()).await?;
        Ok(true)
    }

    /// The pod of the first replica.
    pub async fn pod(&self) -> anyhow::Result<Option<Pod>> {
        Ok(self.cluster.pods(&self.namespace).get_opt(&self.pod_name()).await?)
    }

    /// Waits until the model, as it was applied last, is ready in a pod other than `former`; gives the
    /// pod. Says what happens meanwhile.
    pub async fn ready(
        &self,
        progress: &mut Progress,
        former: Option<&str>,
    ) -> anyhow::Result<Pod> {
        let models = self.models().await?;
        let what = format!("{} is Ready", self.name());
        wait(progress, READY_DURATION_MAX, &what, async || {
            let model = models.get(self.name()).await?;
            let Some(pod) = self.pod().await? else {
                return Ok(Look::NotYet(describe_condition(&model)));
            };
            let is_another = pod.uid().as_deref() != former;
            if is_another && is_pod_ready(&pod) && is_model_ready(&model) {
                return Ok(Look::Done(pod));
            }
            let state = format!("{}; {}", describe_pod(&pod), describe_condition(&model));
            Ok(Look::NotYet(state))
        })
        .await
    }

    /// A client that reaches the model through its service.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let services: Api<Service> = self.cluster.namespaced(&self.namespace);
        let service = services.get(self.name()).await?;
        let spec = service.spec.context("a service without a spec")?;
        let address = spec.cluster_ip.context("a service without an address")?;
        let served = self.model["spec"]["model"]["name"].as_str().unwrap_or_default();
        Ok(Client::new(format!("http://{address}"), served))
    }
}

fn is_pod_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True")
}

/// Ready, and said of the spec that was applied last.
fn is_model_ready(model: &DynamicObject) -> bool {
    let observed = model.data["status"]["observedGeneration"].as_i64();
    observed == model.metadata.generation
        && ready_condition(model).is_some_and(|condition| condition["status"] == "True")
}

fn ready_condition(model: &DynamicObject) -> Option<&Value> {
    let conditions = model.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == "Ready")
}

fn describe_condition(model: &DynamicObject) -> String {
    match ready_condition(model) {
        Some(condition) => format!(
            "model: {} ({})",
            condition["reason"].as_str().unwrap_or("no reason"),
            condition["message"].as_str().unwrap_or_default(),
        ),
        None => "model: the operator has not looked at it yet".to_owned(),
    }
}
