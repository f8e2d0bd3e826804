//! Where the admin API asks for transfers. They run on a thread of their own, beside the loop, and go on to
//! their end whether or not somebody still looks.

use std::path::PathBuf;
use std::sync::Arc;

use kv_protocol::ConversationId;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::ask::{Model, Refused};
use super::client::Peer;
use super::pull::{PullError, Puller, Report};
use crate::tier::remote::{Offloaded, RemoteError, RemoteStore};

/// Why a transfer is not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotConfigured {
    /// Nothing to sign requests with.
    #[error("this daemon has no --migration-secret-file, so no other daemon would answer it")]
    Secret,
    /// No store.
    #[error("this daemon has no --remote-url")]
    Remote,
}

/// Where to import from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// Another daemon's `--migration-listen`, host and port.
    Daemon(String),
    /// The remote tier.
    Remote,
}

/// An import under way.
pub struct Import {
    /// How far it is.
    pub shown: watch::Receiver<Report>,
    /// Its end.
    pub end: JoinHandle<Result<Report, PullError>>,
}

/// See the module.
#[derive(Clone)]
pub struct Desk {
    runtime: Handle,
    puller: Puller,
    secret: Option<PathBuf>,
    remote: Option<Arc<RemoteStore>>,
}

impl Desk {
    /// Transfers run on `runtime`.
    pub fn new(
        runtime: Handle,
        puller: Puller,
        secret: Option<PathBuf>,
        remote: Option<RemoteStore>,
    ) -> Self {
        Self { runtime, puller, secret, remote: remote.map(Arc::new) }
    }

    /// The model that imports must be of.
    pub async fn model(&self) -> Result<Model, Refused> {
        self.puller.state.model().await
    }

    /// Begins an import.
    pub fn import(&self, id: ConversationId, from: From) -> Result<Import, NotConfigured> {
        let puller = self.puller.clone();
        let (show, shown) = watch::channel(Report::default());
        let end = match from {
            From::Daemon(address) => {
                let secret = self.secret.clone().ok_or(NotConfigured::Secret)?;
                let peer = Peer { address, secret };
                self.runtime.spawn(async move { puller.pull(&peer, id, &show).await })
            }
            From::Remote => {
                let remote = self.remote.clone().ok_or(NotConfigured::Remote)?;
                self.runtime.spawn(async move { puller.pull(&*remote, id, &show).await })
            }
        };
        Ok(Import { shown, end })
    }

    /// Puts a conversation into the remote tier.
    pub fn offload(
        &self,
        id: ConversationId,
    ) -> Result<JoinHandle<Result<Offloaded, RemoteError>>, NotConfigured> {
        let remote = self.remote.clone().ok_or(NotConfigured::Remote)?;
        let state = self.puller.state.clone();
        Ok(self.runtime.spawn(async move { remote.offload(&state, id).await }))
    }
}
