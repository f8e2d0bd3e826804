//! The spec of a `ConversationModel`, part by part.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ByteSize, ConversationModelStatus, Span};

/// One language model, served to conversations by a fleet of replicas. Each replica is a pod of two
/// containers, the runtime and its cache daemon, and a volume that keeps the KV cache when the pod goes.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "colloquy.dev",
    version = "v1alpha1",
    kind = "ConversationModel",
    plural = "conversationmodels",
    shortname = "convo",
    category = "colloquy",
    namespaced,
    cel,
    derive = "PartialEq",
    status = "ConversationModelStatus",
    doc = "A language model served to conversations, with a KV cache that lives in host memory and on disk.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    selectable = ".spec.model.name",
    printcolumn(
        name = "Model",
        type_ = "string",
        json_path = ".spec.model.name",
        description = "Name under which the model is served"
    ),
    printcolumn(
        name = "Ready",
        type_ = "integer",
        json_path = ".status.readyReplicas",
        description = "Replicas that answer requests"
    ),
    printcolumn(
        name = "Desired",
        type_ = "integer",
        json_path = ".spec.replicas",
        description = "Replicas asked for"
    ),
    printcolumn(
        name = "Status",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        description = "Why the model is ready, or is not"
    ),
    printcolumn(
        name = "Host",
        type_ = "string",
        json_path = ".spec.cache.host.memory",
        description = "Host memory for KV in each replica",
        priority = 1
    ),
    printcolumn(
        name = "Disk",
        type_ = "string",
        json_path = ".spec.cache.disk.size",
        description = "Disk for KV of each replica",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        description = "What is waited for, or what must be fixed",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(
        "self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"
    )
    .message("metadata.name names pods, a service and labels: at most 50 characters of a-z, 0-9 and -, beginning with a letter")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.model.image) != has(self.model.persistentVolumeClaim)")
        .message("exactly one of model.image and model.persistentVolumeClaim must be given")
        .field_path(".model"),
    validation = Rule::new("self.model.name == oldSelf.model.name")
        .message("model.name is immutable: clients ask for it and the cache is kept under it; create another ConversationModel instead")
        .field_path(".model.name"),
    validation = Rule::new("self.runtime.stepTokensMax >= self.runtime.sequencesMax")
        .message("runtime.stepTokensMax must be at least runtime.sequencesMax: each running sequence takes one token of every step")
        .field_path(".runtime.stepTokensMax"),
    validation = Rule::new("self.runtime.contextMax == 0 || self.runtime.contextMax >= self.runtime.tokensPerBlock")
        .message("runtime.contextMax must be 0 (the model's own) or at least runtime.tokensPerBlock")
        .field_path(".runtime.contextMax"),
    validation = Rule::new("self.runtime.tokensPerBlock % 16 == 0")
        .message("runtime.tokensPerBlock must be a multiple of 16: the kernels work in tiles of 16 tokens")
        .field_path(".runtime.tokensPerBlock"),
    validation = Rule::new("quantity(self.runtime.deviceMemory).compareTo(quantity('64Mi')) >= 0")
        .message("runtime.deviceMemory must be at least 64Mi, or not even one conversation fits")
        .field_path(".runtime.deviceMemory"),
    validation = Rule::new("quantity(self.cache.host.memory).compareTo(quantity('64Mi')) >= 0")
        .message("cache.host.memory must be at least 64Mi, or frames are evicted before they can be used")
        .field_path(".cache.host.memory"),
    validation = Rule::new("quantity(self.cache.disk.size).compareTo(quantity('256Mi')) >= 0")
        .message("cache.disk.size must be at least 256Mi: the index and its log need room beside the KV")
        .field_path(".cache.disk.size"),
    validation = Rule::new("quantity(self.cache.disk.size).compareTo(quantity(oldSelf.cache.disk.size)) >= 0")
        .message("cache.disk.size may only grow: Kubernetes cannot shrink a volume; create another ConversationModel instead")
        .field_path(".cache.disk.size"),
    validation = Rule::new("has(self.cache.disk.storageClassName) == has(oldSelf.cache.disk.storageClassName) && (!has(self.cache.disk.storageClassName) || self.cache.disk.storageClassName == oldSelf.cache.disk.storageClassName)")
        .message("cache.disk.storageClassName is immutable: Kubernetes cannot move a volume to another class")
        .field_path(".cache.disk"),
    validation = Rule::new("!self.adaSkip.decode.extras || self.adaSkip.decode.sublayers > 0")
        .message("adaSkip.decode.extras needs adaSkip.decode.sublayers of at least 1: extras are added to that set")
        .field_path(".adaSkip.decode.extras")
)]
pub struct ConversationModelSpec {
    /// How many replicas serve the model. Also set through `/scale` (kubectl scale, an autoscaler).
    /// 0 ends all pods and keeps the cache volumes.
    #[serde(default = "one_replica")]
    #[schemars(range(max = 64))]
    pub replicas: u32,

    /// Which model is served, and where its weights come from.
    pub model: ModelSpec,

    /// The inference server of each replica.
    #[serde(default)]
    pub runtime: RuntimeSpec,

    /// Sublayers that are left out because they change their input the least (AdaSkip). Nothing is
    /// skipped by default.
    #[serde(default)]
    pub ada_skip: AdaSkipSpec,

    /// Where KV of conversations lives between their turns.
    #[serde(default)]
    pub cache: CacheSpec,

    /// Where the pods run.
    #[serde(default)]
    pub pod_template: PodTemplateSpec,
}

fn one_replica() -> u32 {
    1
}

/// Which model is served, and where its weights come from: exactly one of `image` and
/// `persistentVolumeClaim`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Name under which clients ask for the model, such as `smollm2-135m-instruct`. Immutable.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9]([-._/A-Za-z0-9]*[A-Za-z0-9])?$")
    )]
    pub name: String,

    /// OCI image that holds the weights, mounted read-only as an image volume. Its root must hold
    /// exactly one `.gguf` file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// Volume claim in the same namespace that holds the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ModelClaim>,

    /// Memory that the weights take in the runtime: at least the size of the file. Part of the
    /// container's memory limit.
    #[serde(default = "ModelSpec::default_memory")]
    pub memory: ByteSize,
}

impl ModelSpec {
    fn default_memory() -> ByteSize {
        ByteSize::mebibytes(512)
    }
}

/// A volume claim that holds weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelClaim {
    /// Name of the claim. It is mounted read-only by every replica.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,

    /// Path inside the volume: a `.gguf` file, or a folder that holds exactly one. Default: the
    /// volume's root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = r"^[A-Za-z0-9_][-._/A-Za-z0-9]*$"))]
    pub path: Option<String>,
}

/// The inference server of each replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeSpec {
    /// Image of the runtime. Default: the one that the operator was installed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// Threads that compute. More than the node has cores makes every step slower.
    #[schemars(range(min = 1, max = 256))]
    pub threads: u32,

    /// CPU requested for the runtime, in thousandths of a core. No limit is set: a throttled thread
    /// would hold up the whole step.
    #[schemars(range(min = 10, max = 256_000))]
    pub cpu_milli: u32,

    /// Sequences that run at the same time; further requests wait.
    #[schemars(range(min = 1, max = 256))]
    pub sequences_max: u32,

    /// Requests that may wait for a place; a further one is answered 503.
    #[schemars(range(min = 1, max = 65_536))]
    pub waiting_max: u32,

    /// Longest context in tokens, prompt and answer together; 0 means the model's own.
    #[schemars(range(max = 4_194_304))]
    pub context_max: u32,

    /// Tokens of one step over all sequences: a longer prompt is prefilled in chunks of this size.
    #[schemars(range(min = 16, max = 65_536))]
    pub step_tokens_max: u32,

    /// Tokens whose KV is stored, moved and found as one block. A multiple of 16.
    #[schemars(range(min = 16, max = 256))]
    pub tokens_per_block: u32,

    /// Memory of the KV blocks that the backend computes on. At least 64Mi.
    pub device_memory: ByteSize,

    /// Opens POST /admin/device-cache/clear, for measurements only.
    pub admin: bool,
}

impl Default for RuntimeSpec {
    fn default() -> Self {
        Self {
            image: None,
            threads: 2,
            cpu_milli: 500,
            sequences_max: 8,
            waiting_max: 256,
            context_max: 0,
            step_tokens_max: 512,
            tokens_per_block: 64,
            device_memory: ByteSize::mebibytes(512),
            admin: false,
        }
    }
}

/// Which sublayers are skipped, and which KV may be used again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AdaSkipSpec {
    /// Skipping while a prompt is read.
    pub prefill: PrefillSkipSpec,

    /// Skipping while an answer is written.
    pub decode: DecodeSkipSpec,

    /// Whether KV that was computed with other sublayers skipped may be used.
    pub reuse: Reuse,
}

/// Skipping while a prompt is read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PrefillSkipSpec {
    /// How many sublayers to skip (the k of AdaSkip). A model of 30 layers has 60 sublayers. Which
    /// ones is learned from a calibration text before the replica is ready.
    #[schemars(range(max = 512))]
    pub sublayers: u32,
}

/// Skipping while an answer is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DecodeSkipSpec {
    /// How many sublayers to skip (the k of AdaSkip), learned as prefill's are. Where the two sets
    /// differ, the KV of an answer is computed again by the next turn, unless `reuse` is `Any`.
    #[schemars(range(max = 512))]
    pub sublayers: u32,

    /// Tokens at the beginning of an answer that are measured before extras are added.
    #[schemars(range(min = 1, max = 4_096))]
    pub learn_tokens: u32,

    /// Also skips, in one answer, the FFN sublayers that have changed its first `learnTokens` tokens
    /// less than the set above would.
    pub extras: bool,
}

impl Default for DecodeSkipSpec {
    fn default() -> Self {
        Self { sublayers: 0, learn_tokens: 20, extras: false }
    }
}

/// Which stored KV a turn may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Reuse {
    /// Only what this turn would compute itself, bit for bit; the rest is computed again.
    #[default]
    Own,
    /// Whatever holds the layers that this turn runs.
    Any,
}

/// Where KV of conversations lives between their turns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CacheSpec {
    /// Whether KV lives beyond the runtime's own memory. `false` is the one switch for all of it: replicas
    /// have neither a cache daemon nor a volume, and every turn computes its history again. Volumes that
    /// are there already stay, unless `disk.whenScaledDown` is `Delete`.
    pub enabled: bool,

    /// Image of the cache daemon. Default: the one that the operator was installed with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// The tier in host memory, shared by the daemon and the runtime.
    pub host: HostSpec,

    /// The tier on disk, on a volume that survives the pod.
    pub disk: DiskSpec,

    /// Which blocks move between the tiers, and which are dropped first.
    pub policy: CachePolicy,

    /// How long KV of an idle conversation is kept; 0 keeps it until its room is needed.
    pub ttl: Span,

    /// Prompts whose leading blocks all tenants share. Without this two `cache_salt`s never share KV.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub shared_prefixes: Vec<SharedPrefix>,
}

/// A prompt that all tenants send.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SharedPrefix {
    /// A system prompt, to the letter as clients send it. It is part of the pod's command line: no place
    /// for secrets.
    #[schemars(length(min = 1, max = 16_384))]
    pub system: String,
}

impl Default for CacheSpec {
    fn default() -> Self {
        Self {
            enabled: true,
            image: None,
            host: HostSpec::default(),
            disk: DiskSpec::default(),
            policy: CachePolicy::default(),
            ttl: Span::hours(24),
            shared_prefixes: Vec::new(),
        }
    }
}

/// The tier in host memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HostSpec {
    /// Memory for KV in each replica, faulted at start and counted in the daemon's memory limit. At
    /// least 64Mi.
    pub memory: ByteSize,
}

impl Default for HostSpec {
    fn default() -> Self {
        Self { memory: ByteSize::mebibytes(512) }
    }
}

/// The tier on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskSpec {
    /// Size of each replica's volume. It may only grow, and only where the storage class allows it.
    /// The daemon fills four fifths of it.
    pub size: ByteSize,

    /// Storage class of the volumes; default: the cluster's. Local disks are what this tier is made
    /// for. Immutable.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,

    /// What becomes of a replica's volume when the model is scaled down. Volumes are always deleted
    /// with the model.
    pub when_scaled_down: ScaleDownVolume,
}

impl Default for DiskSpec {
    fn default() -> Self {
        Self {
            size: ByteSize::gibibytes(2),
            storage_class_name: None,
            when_scaled_down: ScaleDownVolume::default(),
        }
    }
}

/// What becomes of a replica's volume when the model is scaled down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ScaleDownVolume {
    /// It is kept, and the replica is warm when it comes back.
    #[default]
    Keep,
    /// It is deleted once the replica's pod has gone.
    Delete,
}

/// Which blocks move between the tiers, and which are dropped first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CachePolicy {
    /// By what the scheduler's queue says is needed next (CachedAttention).
    #[default]
    LookAhead,
    /// Least recently used first; nothing is fetched ahead.
    Lru,
    /// Oldest first; nothing is fetched ahead.
    Fifo,
}

/// Where the pods run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PodTemplateSpec {
    /// Labels that a node must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the pods tolerate.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,

    /// Priority class of the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// Names of Secrets with which images are pulled. The operator never reads them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<String>,

    /// Seconds that running turns, and then the daemon's last writes, have when a pod is ended.
    #[schemars(range(min = 10, max = 3_600))]
    pub termination_grace_period_seconds: u32,
}

impl Default for PodTemplateSpec {
    fn default() -> Self {
        Self {
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            priority_class_name: None,
            image_pull_secrets: Vec::new(),
            termination_grace_period_seconds: 60,
        }
    }
}
