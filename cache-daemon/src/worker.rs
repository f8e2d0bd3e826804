//! The worker: maps the region that the supervisor holds, starts the threads, runs the loop.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};

use kv_protocol::sync::Ordering;
use kv_protocol::table::RegionView;

use crate::config::Config;
use crate::daemon::{Daemon, Ended};
use crate::inventory::Inventory;
use crate::metrics::Metrics;
use crate::migrate::ask::Loop;
use crate::migrate::pace::Paces;
use crate::migrate::start::{StartError, start as start_migration};
use crate::shm::map::{self, EXTENT_BYTES, MapError};
use crate::store::{Store, StoreConfig};
use crate::tier::disk::none::NoDisk;
use crate::tier::disk::{DiskError, DiskTier, DiskWorkers, Engine};
use crate::{admin, http, listen};

/// Threads that fault the region's pages: 16 did 16 GiB in 3.8 s where one took 8.9 s.
const FAULT_THREADS_MAX: usize = 16;

/// Why a worker did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The region.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A thread, or a signal handler.
    #[error("starting {what}: {source}")]
    Start {
        /// Which.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Migrations, or the remote tier.
    #[error(transparent)]
    Migration(#[from] StartError),
    /// Two metrics of one name: a bug.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// A number on the command line that is no open descriptor.
    #[error("descriptor {number} is not open: `worker` is started by `supervise` only")]
    Descriptor {
        /// Given.
        number: RawFd,
    },
}

/// Takes over a descriptor that the supervisor left open for this process.
pub fn inherit(number: RawFd) -> Result<OwnedFd, WorkerError> {
    // An open descriptor has an entry in /proc; the standard streams are never passed this way.
    let is_open =
        number > 2 && std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
    if !is_open {
        return Err(WorkerError::Descriptor { number });
    }
    // SAFETY: the descriptor is open (checked above), and nobody else in this process owns it: `main` calls
    // this first, once for each number, before any file is opened, so the number can only be one that
    // the parent left to us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Runs until SIGTERM, or until the disk tier has been broken for a while.
pub fn run(config: &Config, listener: OwnedFd, memfd: OwnedFd) -> Result<Ended, WorkerError> {
    yield_to_the_engine();
    let start = |what| move |source| WorkerError::Start { what, source };
    let view = RegionView::new(map::map(&memfd)?);
    let memfd = Arc::new(memfd);
    let metrics = Metrics::new()?;
    let notify = {
        let view = view.clone();
        move || view.daemon_doorbell().ring()
    };
    let (peer_events, peers) = channel();
    let (disk_events, disk_done) = channel();
    let (subscribers, new_subscribers) = channel();
    let of_folder = || config.disk_dir.as_deref().map_or(Engine::Slots, Engine::of_folder);
    let engine = config.disk_engine.unwrap_or_else(of_folder);
    let disk = DiskWorkers::spawn(opener(config, engine), disk_events, notify.clone())
        .map_err(start("disk threads"))?;
    let store_config = StoreConfig {
        policy: config.policy,
        disk_engine: engine,
        disk_bytes: if config.disk_dir.is_some() { config.disk_bytes } else { 0 },
        ttl_ms: config.ttl.map(|ttl| ttl.as_millis() as u64),
        tail_idle_ms: config.tail_idle.as_millis() as u64,
        tenant_share: config.tenant_share,
        write_bytes_per_day: config.write_bytes_per_day,
        deletion_deadline_ms: config.deletion_deadline.as_millis() as u64,
    };
    let paces = Paces::new(config.migration_bytes_per_second);
    let store = Store::new(store_config, disk, metrics.clone(), paces.clone());
    let inventory = Inventory::new(new_subscribers);
    let state = Loop::new(peer_events.clone(), notify.clone());
    let migration = start_migration(config, paces, &state, &metrics)?;
    let daemon = Daemon::new(view.clone(), store, metrics.clone(), peers, disk_done, inventory)
        .with_remote(migration.remote, config.remote_on_stop);
    // Only now: whoever connects finds the region adopted, and whoever asks is shown a state.
    let (path, events) = (&config.admin_socket, peer_events.clone());
    if let Err(error) = admin::spawn(path, metrics.clone(), migration.desk, events, notify.clone())
    {
        tracing::error!(%error, "no admin API: kvctl will not reach this worker"); // The cache works on.
    }
    http::spawn(config.http, metrics, subscribers, peer_events.clone(), notify.clone())
        .map_err(start("http"))?;
    listen::spawn(UnixListener::from(listener), memfd.clone(), peer_events, notify)
        .map_err(start("listening"))?;
    fault_in_background(&view, &memfd).map_err(start("faulting"))?;
    let ended = daemon.run();
    migration.runtime.shutdown_background();
    Ok(ended)
}

/// A ring of the doorbell must not push the engine, which rings it, off its core: threads of `SCHED_BATCH`
/// preempt nobody by waking up. They start at once on an idle core, and within a tick on a full machine.
/// This thread and those that it starts from here on.
fn yield_to_the_engine() {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one `sched_param`, which lives until it returns; thread 0 is the caller's own,
    // and nothing but its scheduling changes.
    let failed = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter) };
    if failed != 0 {
        let error = std::io::Error::last_os_error();
        tracing::info!(%error, "no batch scheduling: wake-ups may delay the engine's steps");
    }
}

fn opener(
    config: &Config,
    engine: Engine,
) -> impl FnOnce() -> Result<Box<dyn DiskTier>, DiskError> + Send + 'static {
    let (dir, bytes) = (config.disk_dir.clone(), config.disk_bytes);
    move || {
        Ok(match dir {
            Some(dir) => engine.open(&dir, bytes)?,
            None => Box::new(NoDisk),
        })
    }
}

/// Allocates the region's pages beside the loop, extent by extent, on several threads: the kernel zeroes
/// pages at some GB/s a core. Frames are given as far as all extents before them are there, so serving
/// starts with the first. Done once in a region's life.
fn fault_in_background(view: &RegionView, memfd: &Arc<OwnedFd>) -> std::io::Result<()> {
    let total = view.region().bytes();
    let begin = view.faulted_bytes().load(Ordering::Relaxed).min(total);
    let extents = (total - begin).div_ceil(EXTENT_BYTES);
    let faulting = Arc::new(Mutex::new(Faulting { next: 0, under_way: BTreeSet::new() }));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for number in 0..extents.min(cores.min(FAULT_THREADS_MAX) as u64) {
        let (view, memfd, faulting) = (view.clone(), memfd.clone(), faulting.clone());
        let fault = move || {
            let lock = || faulting.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(extent) = { lock().begin(extents) } {
                let at = begin + extent * EXTENT_BYTES;
                if let Err(error) = map::fault_extent(&*memfd, at, EXTENT_BYTES.min(total - at)) {
                    tracing::error!(
                        %error, descriptor = memfd.as_raw_fd(), at, total,
                        "no memory for the whole region: the container's limit must cover --host-bytes"
                    );
                    return; // What is under way for ever holds back all that follows.
                }
                let mut faulting = lock();
                let done = (begin + faulting.end(extent) * EXTENT_BYTES).min(total);
                view.faulted_bytes().store(done, Ordering::Relaxed);
                drop(faulting);
                view.daemon_doorbell().ring();
            }
        };
        std::thread::Builder::new().name(format!("fault-{number}")).spawn(fault)?;
    }
    Ok(())
}

/// Which extents are being faulted.
struct Faulting {
    next: u64,
    under_way: BTreeSet<u64>,
}

impl Faulting {
    fn begin(&mut self, extents: u64) -> Option<u64> {
        let extent = self.next;
        if extent == extents {
            return None;
        }
        self.next += 1;
        self.under_way.insert(extent);
        Some(extent)
    }

    /// One is there; how many are, counted from the first without a gap.
    fn end(&mut self, extent: u64) -> u64 {
        self.under_way.remove(&extent);
        self.under_way.first().copied().unwrap_or(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_counts_when_all_before_it_are_there() {
        let mut faulting = Faulting { next: 0, under_way: BTreeSet::new() };
        let [first, second, third] = [0; 3].map(|_| faulting.begin(3).unwrap());
        assert_eq!(faulting.begin(3), None);
        assert_eq!(faulting.end(second), first);
        assert_eq!(faulting.end(first), third);
        assert_eq!(faulting.end(third), 3);
    }
}
