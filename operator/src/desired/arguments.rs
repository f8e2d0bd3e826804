//! Command lines of the two programs of a replica. The pod and `local` are made by the same code:
//! only the places (paths, addresses) differ.

use crate::api::{CachePolicy, ConversationModelSpec, Reuse};

/// Four fifths of the volume are for blocks; the rest is for the file system, the index, its log,
/// and what compaction writes before it frees.
const DISK_FILL_NUMERATOR: u64 = 4;
const DISK_FILL_DENOMINATOR: u64 = 5;
const _: () = assert!(DISK_FILL_NUMERATOR < DISK_FILL_DENOMINATOR); // Never the whole volume.

/// Where a cache daemon finds its socket, its disk and its address.
#[derive(Clone, Copy, Debug)]
pub struct DaemonPlaces<'a> {
    /// Path of the Unix socket on which runtimes attach.
    pub socket: &'a str,
    /// Folder of the disk tier.
    pub disk_dir: &'a str,
    /// Address of health and metrics.
    pub http: &'a str,
}

/// Where a runtime finds its model, its daemon and its address.
#[derive(Clone, Copy, Debug)]
pub struct RuntimePlaces<'a> {
    /// A `.gguf` file, or a folder that holds exactly one.
    pub model: &'a str,
    /// Path of the daemon's Unix socket.
    pub cache_socket: &'a str,
    /// Address of the API.
    pub http: &'a str,
}

/// Arguments of `cache-daemon`.
pub fn daemon(spec: &ConversationModelSpec, places: DaemonPlaces<'_>) -> Vec<String> {
    let policy = match spec.cache.policy {
        CachePolicy::LookAhead => "look-ahead",
        CachePolicy::Lru => "lru",
        CachePolicy::Fifo => "fifo",
    };
    let disk_bytes = spec.cache.disk.size.get() / DISK_FILL_DENOMINATOR * DISK_FILL_NUMERATOR;
    let mut arguments = vec!["supervise".to_owned()];
    let mut flag = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
    flag("socket", places.socket.into());
    flag("host-bytes", spec.cache.host.memory.get().to_string());
    flag("disk-dir", places.disk_dir.into());
    flag("disk-bytes", disk_bytes.to_string());
    flag("http", places.http.into());
    flag("policy", policy.into());
    flag("ttl-seconds", spec.cache.ttl.seconds().to_string());
    arguments
}

/// Arguments of `runtime`.
pub fn runtime(spec: &ConversationModelSpec, places: RuntimePlaces<'_>) -> Vec<String> {
    let reuse = match spec.ada_skip.reuse {
        Reuse::Own => "own",
        Reuse::Any => "any",
    };
    let (runtime, prefill, decode) = (&spec.runtime, &spec.ada_skip.prefill, &spec.ada_skip.decode);
    let mut arguments = Vec::new();
    let mut flag = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
    flag("model", places.model.into());
    flag("served-name", spec.model.name.clone());
    flag("http", places.http.into());
    if spec.cache.enabled {
        flag("cache-socket", places.cache_socket.into());
    }
    flag("device-bytes", runtime.device_memory.get().to_string());
    flag("sequences-max", runtime.sequences_max.to_string());
    flag("waiting-max", runtime.waiting_max.to_string());
    flag("context-max", runtime.context_max.to_string());
    flag("tokens-per-block", runtime.tokens_per_block.to_string());
    flag("step-tokens-max", runtime.step_tokens_max.to_string());
    flag("threads", runtime.threads.to_string());
    flag("adaskip-prefill", prefill.sublayers.to_string());
    flag("adaskip-decode", decode.sublayers.to_string());
    flag("adaskip-learn-tokens", decode.learn_tokens.to_string());
    flag("adaskip-extras", decode.extras.to_string());
    flag("reuse", reuse.into());
    let prefixes = spec.cache.shared_prefixes.iter();
    arguments.extend(prefixes.map(|prefix| format!("--shared-prefix={}", prefix.system)));
    if runtime.admin {
        arguments.push("--admin".into());
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ByteSize, SharedPrefix};
    use crate::fixtures;

    #[test]
    fn the_daemon_is_told_less_disk_than_the_volume_has() {
        let mut model = fixtures::model();
        model.spec.cache.disk.size = ByteSize::gibibytes(10);
        let places = DaemonPlaces { socket: "/s", disk_dir: "/d", http: "127.0.0.1:1" };
        let arguments = daemon(&model.spec, places);
        let at = arguments.iter().position(|argument| argument == "--disk-bytes").unwrap();
        assert_eq!(arguments[at + 1], (8_u64 << 30).to_string());
    }

    #[test]
    fn a_runtime_whose_cache_is_off_is_given_no_socket() {
        let places = RuntimePlaces { model: "/m", cache_socket: "/s", http: "127.0.0.1:1" };
        let mut model = fixtures::model();
        assert!(runtime(&model.spec, places).contains(&"--cache-socket".to_owned()));
        model.spec.cache.enabled = false;
        assert!(!runtime(&model.spec, places).iter().any(|argument| argument.contains("cache")));
    }

    #[test]
    fn each_shared_prefix_is_one_argument_whatever_is_in_it() {
        let places = RuntimePlaces { model: "/m", cache_socket: "/s", http: "127.0.0.1:1" };
        let mut model = fixtures::model();
        let system = "--help\nYou are \"kind\".".to_owned();
        model.spec.cache.shared_prefixes = vec![SharedPrefix { system }];
        let arguments = runtime(&model.spec, places);
        assert!(arguments.contains(&"--shared-prefix=--help\nYou are \"kind\".".to_owned()));
    }

    #[test]
    fn admin_calls_are_closed_unless_asked_for() {
        let places = RuntimePlaces { model: "/m", cache_socket: "/s", http: "127.0.0.1:1" };
        let mut model = fixtures::model();
        assert!(!runtime(&model.spec, places).contains(&"--admin".to_owned()));
        model.spec.runtime.admin = true;
        assert!(runtime(&model.spec, places).contains(&"--admin".to_owned()));
    }
}
