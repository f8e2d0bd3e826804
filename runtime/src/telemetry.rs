//! The log: `tracing` on stderr, for people or as one JSON object a line.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::TryInitError;

use crate::config::LogFormat;

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// `--log` is no filter.
    #[error("--log `{filter}` is not a filter: {reason}")]
    Filter {
        /// As given.
        filter: String,
        /// What tracing says.
        reason: String,
    },
    /// A log exists already.
    #[error("the log cannot be started: {0}")]
    Start(#[from] TryInitError),
}

/// Starts the process's log; once.
pub fn start(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    use tracing_subscriber::util::SubscriberInitExt;
    let filter = EnvFilter::try_new(filter).map_err(|error| TelemetryError::Filter {
        filter: filter.to_owned(),
        reason: error.to_string(),
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr);
    match format {
        LogFormat::Text => log.with_target(false).finish().try_init()?,
        LogFormat::Json => log.json().finish().try_init()?,
    }
    Ok(())
}
