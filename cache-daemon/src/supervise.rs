//! The supervisor: holds the region and the listening socket, and keeps a worker running.
//!
//! It maps nothing and parses nothing, so there is little in it that can die: host frames and the socket
//! outlive any number of workers. Fit to be PID 1: it reaps whatever it inherits and passes SIGTERM on.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, WaitOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::handback;
use crate::shm::map::{self, MapError};

/// A worker that dies before this has not even started: pauses grow.
const YOUNG: Duration = Duration::from_millis(20);
/// A worker that lived this long is replaced at once.
const GROWN: Duration = Duration::from_secs(1);
/// Pause before the restart after a short life; doubles with each further young death.
const BACK_OFF_MIN: Duration = Duration::from_millis(10);
/// Longest pause.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// Why the supervisor ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuperviseError {
    /// The region.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A system call.
    #[error("{what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        source: std::io::Error,
    },
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> SuperviseError {
    let what = what.into();
    move |source| SuperviseError::Io { what, source }
}

/// Runs until SIGTERM or SIGINT, and until the worker has ended after that.
pub fn run(config: &Config) -> Result<(), SuperviseError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io("starting the runtime"))?;
    runtime.block_on(supervise(config))
}

async fn supervise(config: &Config) -> Result<(), SuperviseError> {
    // Before the first child: no death is missed.
    let handler = |kind, what: &str| signal(kind).map_err(io(what));
    let mut terminate = handler(SignalKind::terminate(), "handling SIGTERM")?;
    let mut interrupt = handler(SignalKind::interrupt(), "handling SIGINT")?;
    let mut child = handler(SignalKind::child(), "handling SIGCHLD")?;
    let had_predecessor = config.socket.exists();
    let listener = listen(&config.socket)?;
    let handed_back =
        had_predecessor.then(|| handback::wait(&listener, config.host_bytes)).flatten();
    let memfd = match handed_back {
        Some(memfd) => {
            tracing::info!("the region of an earlier supervisor was handed back");
            memfd
        }
        None => map::create(config.host_bytes, config.huge_pages)?,
    };
    for descriptor in [memfd.as_fd(), listener.as_fd()] {
        rustix::io::fcntl_setfd(descriptor, FdFlags::empty())
            .map_err(|errno| io("passing descriptors on")(errno.into()))?;
    }
    let mut stopping = false;
    let mut back_off = BackOff::default();
    loop {
        let started = Instant::now();
        let worker = spawn_worker(&memfd, &listener)?;
        tracing::info!(pid = worker.as_raw_nonzero().get(), "worker started");
        // Until the worker is dead; signals are passed on meanwhile.
        let status = loop {
            if let Some(status) = reap(worker) {
                break status;
            }
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = child.recv() => continue,
            }
            stopping = true;
            // Dead already, perhaps: `reap` will say so.
            let _ = rustix::process::kill_process(worker, Signal::TERM);
        };
        if stopping {
            tracing::info!("worker ended: {status}");
            return Ok(());
        }
        let pause = back_off.after(started.elapsed());
        tracing::warn!("worker died ({status}); a new one starts in {pause:?}");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

/// Binds the socket for the container's group: two containers with two users share it by group.
fn listen(path: &Path) -> Result<UnixListener, SuperviseError> {
    // The file of an earlier supervisor; a missing one is as good.
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(io(format!("removing the old socket {}", path.display()))(error));
    }
    rustix::process::umask(Mode::from_raw_mode(0o007));
    UnixListener::bind(path).map_err(io(format!("binding {}", path.display())))
}

fn spawn_worker(memfd: &OwnedFd, listener: &UnixListener) -> Result<Pid, SuperviseError> {
    let program = std::env::current_exe().map_err(io("finding this program"))?;
    // Its file may be another by now, or none: workers are of the supervisor's build.
    let program = if program.exists() { program } else { "/proc/self/exe".into() };
    let child = Command::new(program)
        .arg("worker")
        .args(std::env::args_os().skip(2)) // The flags after `supervise` are the worker's, too.
        .arg(format!("--listen-fd={}", listener.as_raw_fd()))
        .arg(format!("--region-fd={}", memfd.as_raw_fd()))
        .spawn()
        .map_err(io("starting a worker"))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io("starting a worker")(std::io::Error::other("its pid is impossible")))
}

/// Reaps every dead child; the status of the worker, if it is among them.
fn reap(worker: Pid) -> Option<String> {
    let mut found = None;
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        if pid == worker {
            found = Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "unknown".into(),
            });
        }
    }
    found
}

/// How long to wait before the next start.
#[derive(Debug, Default)]
struct BackOff {
    young_deaths: u32,
}

impl BackOff {
    /// None after a long life or a single young death.
    fn after(&mut self, life: Duration) -> Duration {
        if life >= YOUNG {
            self.young_deaths = 0;
            return if life >= GROWN { Duration::ZERO } else { BACK_OFF_MIN };
        }
        self.young_deaths += 1;
        match self.young_deaths {
            1 => Duration::ZERO,
            deaths => (BACK_OFF_MIN * 2u32.pow((deaths - 2).min(16))).min(BACK_OFF_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_lived_is_restarted_at_once() {
        let mut back_off = BackOff::default();
        for _ in 0..100 {
            assert_eq!(back_off.after(GROWN), Duration::ZERO);
            assert_eq!(back_off.after(YOUNG), BACK_OFF_MIN);
        }
    }

    #[test]
    fn young_deaths_are_answered_by_longer_and_bounded_pauses() {
        let mut back_off = BackOff::default();
        let pauses: Vec<Duration> = (0..40).map(|_| back_off.after(Duration::ZERO)).collect();
        assert_eq!(pauses[0], Duration::ZERO);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[39], BACK_OFF_MAX);
        assert_eq!(back_off.after(GROWN), Duration::ZERO);
    }
}
