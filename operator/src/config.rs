//! Settings of the operator, valid before anything is opened.

use std::net::SocketAddr;

use clap::{Parser, ValueEnum};

use crate::desired::Images;

/// Command line and environment, as given.
#[derive(Debug, Parser)]
#[command(name = "operator", version, about = "The controller of ConversationModels")]
pub struct Arguments {
    /// Namespace whose models are taken care of; default: all namespaces.
    #[arg(long, env = "COLLOQUY_WATCH_NAMESPACE")]
    watch_namespace: Option<String>,

    /// Image of the runtime, for models that name none.
    #[arg(long, env = "COLLOQUY_RUNTIME_IMAGE", default_value = "colloquy.dev/runtime:0.1.0")]
    runtime_image: String,

    /// Image of the cache daemon, for models that name none.
    #[arg(
        long,
        env = "COLLOQUY_CACHE_DAEMON_IMAGE",
        default_value = "colloquy.dev/cache-daemon:0.1.0"
    )]
    cache_daemon_image: String,

    /// How images of replicas, weights included, are pulled.
    #[arg(long, env = "COLLOQUY_IMAGE_PULL_POLICY", value_enum, default_value = "if-not-present")]
    image_pull_policy: PullPolicy,

    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, env = "COLLOQUY_OPERATOR_HTTP", default_value = "0.0.0.0:8080")]
    http: SocketAddr,

    /// Namespace of the lease; without it there is no leader election, and only one operator may run.
    #[arg(long, env = "COLLOQUY_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,

    /// Name of this candidate for the lease, unique among operators (the pod's name).
    #[arg(long, env = "COLLOQUY_OPERATOR_IDENTITY")]
    identity: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PullPolicy {
    #[value(alias = "Always")]
    Always,
    #[value(alias = "IfNotPresent")]
    IfNotPresent,
    #[value(alias = "Never")]
    Never,
}

/// Valid settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Namespace whose models are taken care of; none: all.
    pub watch_namespace: Option<String>,
    /// Images of models that name none.
    pub images: Images,
    /// Address of metrics and health.
    pub http: SocketAddr,
    /// Leader election, if any.
    pub election: Option<Election>,
}

/// Where and as whom to stand for election.
#[derive(Clone, Debug)]
pub struct Election {
    /// Namespace of the lease.
    pub namespace: String,
    /// Name of this candidate.
    pub identity: String,
}

/// Settings that contradict each other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A candidate needs a name.
    #[error("--lease-namespace needs --identity: two candidates of one name would both lead")]
    NoIdentity,
    /// An image without a name.
    #[error("--{0} must not be empty")]
    EmptyImage(&'static str),
}

impl TryFrom<Arguments> for Config {
    type Error = ConfigError;

    fn try_from(raw: Arguments) -> Result<Self, Self::Error> {
        if raw.runtime_image.is_empty() {
            return Err(ConfigError::EmptyImage("runtime-image"));
        }
        if raw.cache_daemon_image.is_empty() {
            return Err(ConfigError::EmptyImage("cache-daemon-image"));
        }
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let election = match (given(raw.lease_namespace), given(raw.identity)) {
            (Some(namespace), Some(identity)) => Some(Election { namespace, identity }),
            (Some(_), None) => return Err(ConfigError::NoIdentity),
            (None, _) => None,
        };
        Ok(Self {
            watch_namespace: given(raw.watch_namespace),
            images: Images {
                runtime: raw.runtime_image,
                cache_daemon: raw.cache_daemon_image,
                pull_policy: match raw.image_pull_policy {
                    PullPolicy::Always => "Always",
                    PullPolicy::IfNotPresent => "IfNotPresent",
                    PullPolicy::Never => "Never",
                }
                .into(),
            },
            http: raw.http,
            election,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, ConfigError> {
        Arguments::parse_from([&["operator"], arguments].concat()).try_into()
    }

    #[test]
    fn a_candidate_without_a_name_is_refused() {
        assert!(parse(&["--lease-namespace", "colloquy-system"]).is_err());
        let named = ["--lease-namespace", "colloquy-system", "--identity", "operator-a"];
        assert!(parse(&named).unwrap().election.is_some());
        assert!(parse(&[]).unwrap().election.is_none());
    }

    #[test]
    fn pull_policies_are_written_as_kubernetes_writes_them() {
        let config = parse(&["--image-pull-policy", "IfNotPresent"]).unwrap();
        assert_eq!(config.images.pull_policy, "IfNotPresent");
    }
}
