//! The watches: when to look at which model.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use kube::api::{Api, ListParams};
use kube::runtime::controller::{self, Controller};
use kube::runtime::watcher;
use kube::{Client, CustomResourceExt};
use tokio::time::sleep;

use crate::api::ConversationModel;
use crate::desired::{LABEL_MANAGED, MANAGED_BY};
use crate::reconcile::{Context, on_error, reconcile};

/// Models that are looked at side by side; each look is a handful of requests.
const CONCURRENCY: u16 = 16;

/// A pod's start is a burst of events: one look after the burst.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// How often it is tried to reach an API server that has our definition.
const DEFINITION_RETRY: Duration = Duration::from_secs(3);

/// Where models live.
#[derive(Clone, Debug)]
pub struct Scope(pub Option<String>);

impl Scope {
    fn api<K>(&self, client: &Client) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        match &self.0 {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        }
    }
}

/// Waits until models can be listed: the API server answers, the definition is installed, and we
/// may read it.
pub async fn wait_for_definition(client: &Client, scope: &Scope) {
    let api = scope.api::<ConversationModel>(client);
    while let Err(error) = api.list(&ListParams::default().limit(1)).await {
        let definition = ConversationModel::crd_name();
        tracing::warn!(%error, %definition, "models cannot be listed yet; is chart colloquy-crds installed?");
        sleep(DEFINITION_RETRY).await;
    }
}

/// Takes care of models until `shutdown`; running looks are brought to their end.
pub async fn run(
    context: Arc<Context>,
    scope: &Scope,
    shutdown: impl Future<Output = ()> + Send + Sync + 'static,
) {
    let client = &context.client;
    let owned = || watcher::Config::default().labels(&format!("{LABEL_MANAGED}={MANAGED_BY}"));
    let controller = Controller::new(scope.api(client), watcher::Config::default())
        .owns(scope.api::<Pod>(client), owned())
        .owns(scope.api::<Service>(client), owned())
        .owns(scope.api::<PersistentVolumeClaim>(client), owned())
        .with_config(controller::Config::default().concurrency(CONCURRENCY).debounce(DEBOUNCE))
        .graceful_shutdown_on(shutdown);
    let (models, metrics) = (controller.store(), context.metrics.clone());
    controller
        .run(reconcile, on_error, context)
        .for_each(|outcome| {
            metrics.models.set(models.len() as i64);
            match outcome {
                Ok((model, action)) => tracing::debug!(%model, ?action),
                // Errors of a look are logged by `on_error`; what is left are the watches'.
                Err(controller::Error::QueueError(error)) => {
                    tracing::warn!(%error, "a watch broke; it is opened again");
                }
                Err(error) => tracing::debug!(%error),
            }
            std::future::ready(())
        })
        .await;
}
