//! When runtimes die and the disk fails, drawn from a seed.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Exp, Uniform};

use super::settings::Faults;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// A runtime dies, whatever it runs.
    PeerDies(u32),
    /// From now on the disk's reads and writes fail.
    DiskFails,
    /// They succeed again.
    DiskWorks,
}

/// All faults before `end_us`, with their times in microseconds. A law that cannot be draws none.
pub(super) fn draw(faults: &Faults, end_us: u64) -> Vec<(u64, Fault)> {
    let mut rng = ChaCha8Rng::seed_from_u64(faults.seed);
    let end_s = end_us as f64 / 1e6;
    let mut drawn = Vec::new();
    let us = |seconds: f64| (seconds * 1e6) as u64;
    if let (Ok(gaps), Ok(peers)) =
        (Exp::new(1.0 / faults.peer_dies_every_s), Uniform::new(0, faults.peers))
    {
        let mut at = gaps.sample(&mut rng);
        while at < end_s {
            drawn.push((us(at), Fault::PeerDies(peers.sample(&mut rng))));
            at += gaps.sample(&mut rng);
        }
    }
    if let Ok(gaps) = Exp::new(1.0 / faults.disk_fails_every_s) {
        let mut at = gaps.sample(&mut rng);
        while at < end_s {
            drawn.push((us(at), Fault::DiskFails));
            at += faults.disk_fails_for_s;
            if at < end_s {
                drawn.push((us(at), Fault::DiskWorks));
            }
            at += gaps.sample(&mut rng);
        }
    }
    drawn
}
