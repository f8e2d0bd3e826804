//! `cache-daemon supervise` is PID 1 of the sidecar; it starts `cache-daemon worker` for itself.

use std::os::fd::RawFd;
use std::process::ExitCode;

use cache_daemon::config::{Config, Flags};
use cache_daemon::daemon::Ended;
use cache_daemon::migrate::secret::Secret;
use cache_daemon::{supervise, worker};
use clap::Parser;

/// Bad flags.
const EXIT_CONFIG: u8 = 64;
/// Could not start.
const EXIT_START: u8 = 71;
/// The disk tier failed: start clean.
const EXIT_DISK: u8 = 74;

/// KV cache of one replica: a shared region of host memory and a disk tier.
#[derive(Debug, Parser)]
#[command(version)]
enum Command {
    /// Hold the region and the socket, and keep a worker running.
    Supervise(Flags),
    /// Serve (started by `supervise`).
    #[command(hide = true)]
    Worker {
        #[command(flatten)]
        flags: Flags,
        /// Listening socket, inherited.
        #[arg(long)]
        listen_fd: RawFd,
        /// Region, inherited.
        #[arg(long)]
        region_fd: RawFd,
    },
}

fn main() -> ExitCode {
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            let _ = error.print(); // Nowhere to say that standard error is closed.
            return ExitCode::from(if error.use_stderr() { EXIT_CONFIG } else { 0 });
        }
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let flags = match &command {
        Command::Supervise(flags) | Command::Worker { flags, .. } => flags.clone(),
    };
    let config = match Config::try_from(flags) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("cache-daemon: {error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    // Only once: a secret that is spoilt later refuses exports, and a worker goes on without them.
    let secret = config.migration_secret_file.as_deref();
    if let (Command::Supervise(_), Some(Err(error))) = (&command, secret.map(Secret::read)) {
        eprintln!("cache-daemon: {error}");
        return ExitCode::from(EXIT_CONFIG);
    }
    let result = match command {
        Command::Supervise(_) => supervise::run(&config).map_err(anyhow::Error::from),
        Command::Worker { listen_fd, region_fd, .. } => work(&config, listen_fd, region_fd),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<DiskFailed>() => ExitCode::from(EXIT_DISK),
        Err(error) => {
            eprintln!("cache-daemon: {error:#}");
            ExitCode::from(EXIT_START)
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the disk tier failed")]
struct DiskFailed;

fn work(config: &Config, listen_fd: RawFd, region_fd: RawFd) -> anyhow::Result<()> {
    let (listener, region) = (worker::inherit(listen_fd)?, worker::inherit(region_fd)?);
    // A worker never outlives the supervisor that holds its region.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    match worker::run(config, listener, region)? {
        Ended::Stopped => Ok(()),
        Ended::DiskFailed => Err(DiskFailed.into()),
    }
}
