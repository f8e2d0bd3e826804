//! Starts what moves conversations: the threads, the listener, the remote tier.

use std::sync::Arc;

use tokio::runtime::Runtime;

use super::ask::Loop;
use super::desk::Desk;
use super::pace::Paces;
use super::pull::Puller;
use super::server::Exporter;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::tier::remote::{Remote, RemoteError, RemoteStore};

/// Threads that seal, check and send: the loop and the engine keep the other cores.
const THREADS: usize = 2;

/// What was started.
pub struct Started {
    /// Where transfers are asked for.
    pub desk: Desk,
    /// The loop's end of the remote tier.
    pub remote: Option<Remote>,
    /// To be ended after the loop.
    pub runtime: Runtime,
}

/// Why it was not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The remote tier.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A thread.
    #[error("starting threads of migrations: {0}")]
    Threads(#[from] std::io::Error),
}

/// Starts it. A port that is taken is tried again and again, beside the rest.
pub fn start(
    config: &Config,
    paces: Paces,
    state: &Loop,
    metrics: &Arc<Metrics>,
) -> Result<Started, StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("migrate")
        .enable_all()
        .build()?;
    let Paces { sending, receiving } = paces;
    let puller = Puller::new(state.clone(), receiving, metrics.clone());
    let store = config.remote_url.as_ref();
    let store = store.map(|url| RemoteStore::open(url, sending.clone())).transpose()?;
    let remote = store.clone().map(|store| Remote::spawn(runtime.handle(), store, puller.clone()));
    if let (Some(address), Some(secret)) = (config.migration_listen, &config.migration_secret_file)
    {
        let exporter = Exporter::new(state.clone(), secret.clone(), sending, metrics.clone());
        runtime.spawn(exporter.serve(address));
    }
    let secret = config.migration_secret_file.clone();
    let desk = Desk::new(runtime.handle().clone(), puller, secret, store);
    Ok(Started { desk, remote, runtime })
}
