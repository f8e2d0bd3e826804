//! The exporting worker is killed with SIGKILL while it sends.
//!
//! A proxy between the two daemons kills it when so many bytes of an answer have passed, then reads whatever
//! else the dead process left in the socket. The kill "struck inside" if even with that the source has not
//! sent all of its blocks: it died in the middle of the export.
//!
//! `COLLOQUY_CRASH_KILLS` sets the number of kills (12).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::proxy::{Plan, Proxy};
use crate::replica::{Replica, number};
use crate::support::{geometry, kill, until};

const TOKENS: u32 = 16 * 120 + 3;
/// A killed worker's record may not be on disk yet: kills begin behind the description.
const DESCRIPTION_BYTES: u64 = 16 << 10;
/// Slow enough that a source is still sending when it is killed.
const RATE: &str = "--migration-bytes-per-second=1MiB";

#[test]
fn kills_while_a_conversation_is_exported_cost_no_wrong_byte_and_no_hang() {
    let kills: u64 = std::env::var("COLLOQUY_CRASH_KILLS")
        .ok()
        .and_then(|kills| kills.parse().ok())
        .unwrap_or(12);
    let mut source = Replica::start(200, &[RATE]);
    let mut here = Replica::start(200, &[]);
    let payload = u64::from(TOKENS).div_ceil(16) * geometry().payload_bytes();
    let (mut inside, mut arrived, mut seed) = (0, 0, 0x2545_f491_4f6c_dd1d_u64);
    for round in 0..kills {
        // A new conversation each time: nothing of it is here.
        let held = source.hold(round as u32 + 1, TOKENS);
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let at = DESCRIPTION_BYTES + seed % (payload * 3 / 4);
        let worker = until("there is a worker", || source.daemon.worker_pid());
        let struck = Arc::new(AtomicUsize::new(usize::MAX));
        let strike = struck.clone();
        let plan = move |number, sent: u64| match at.checked_sub(sent) {
            None => Plan::Pass, // Done.
            Some(at) => {
                let strike = strike.clone();
                let call = move || {
                    kill(worker, rustix::process::Signal::KILL);
                    strike.store(number, Ordering::Relaxed);
                };
                Plan::CallAt(at, Box::new(call))
            }
        };
        let proxy = Proxy::start(source.exports, plan);
        let report = here.import(held.id, proxy.address).expect("an import");
        let struck = struck.load(Ordering::Relaxed);
        assert_ne!(struck, usize::MAX, "nobody was killed at byte {at}: {report}");
        let until_death: u64 =
            proxy.carried().iter().take(struck + 1).map(|carried| carried.sent).sum();
        inside += u64::from(until_death < payload);
        arrived += number(&report, "arrived");
        assert_eq!(here.check(&held), held.tokens.len(), "round {round}: {report}");
        while source.driver.next_event().is_ok() {} // The last one is that the worker is gone.
        source.driver.wait_attached();
    }
    println!(
        "Export: {inside} of {kills} kills struck inside; {arrived} blocks arrived, each checked"
    );
    assert!(inside * 10 >= kills * 9, "{inside} of {kills} kills struck inside");
}
