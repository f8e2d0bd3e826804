//! Memory limits of the two containers of a replica, computed.
//!
//! Pages of the shared region are charged to the container that touches them first: the daemon,
//! which faults them all at start. When its container dies the pages live on, charged to the pod
//! alone, and the pod's limit is the sum of its containers' limits. So two things must hold:
//!
//! 1. daemon's limit ≥ region + the daemon's own working memory;
//! 2. sum of limits ≥ region + working memory of both, or no container of the pod could start again.
//!
//! (2) follows from (1) because the runtime's own memory is all inside the runtime's limit.

use crate::api::{ByteSize, ConversationModelSpec};

/// The daemon beside the region: RocksDB's memtables, block cache and compaction, blocks on their
/// way to and from the disk, the directory.
const DAEMON_WORKING: ByteSize = ByteSize::mebibytes(384);

/// The volume that holds the socket. Memory-backed, so what is written there counts.
pub const RUN_VOLUME: ByteSize = ByteSize::mebibytes(16);

/// The runtime beside weights and KV: the program, the tokenizer, activations and logits.
const RUNTIME_WORKING: ByteSize = ByteSize::mebibytes(384);

/// Activations, logits and request buffers of one running sequence.
const RUNTIME_WORKING_PER_SEQUENCE: ByteSize = ByteSize::mebibytes(8);

/// Memory limit, and request, of the cache daemon.
pub fn daemon_limit(spec: &ConversationModelSpec) -> ByteSize {
    spec.cache.host.memory + RUN_VOLUME + DAEMON_WORKING
}

/// Memory limit, and request, of the runtime.
pub fn runtime_limit(spec: &ConversationModelSpec) -> ByteSize {
    spec.model.memory + spec.runtime.device_memory + runtime_working(spec)
}

fn runtime_working(spec: &ConversationModelSpec) -> ByteSize {
    let sequences = u64::from(spec.runtime.sequences_max) * RUNTIME_WORKING_PER_SEQUENCE.get();
    RUNTIME_WORKING + ByteSize::bytes(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn the_pod_has_room_for_the_region_and_both_programs_after_a_container_restart() {
        for host_mebibytes in [64, 512, 8 << 10, 64 << 10] {
            let mut spec = fixtures::model().spec;
            spec.cache.host.memory = ByteSize::mebibytes(host_mebibytes);
            let region = spec.cache.host.memory;
            assert!(daemon_limit(&spec) >= region + DAEMON_WORKING);
            let working = DAEMON_WORKING
                + spec.model.memory
                + spec.runtime.device_memory
                + runtime_working(&spec);
            assert!(daemon_limit(&spec) + runtime_limit(&spec) >= region + RUN_VOLUME + working);
        }
    }
}
