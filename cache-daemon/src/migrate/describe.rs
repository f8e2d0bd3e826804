//! What this daemon knows of a conversation, for whoever takes it elsewhere.

use std::collections::HashSet;
use std::sync::Arc;

use kv_protocol::record::Record;
use kv_protocol::start::Start;
use kv_protocol::{BlockKey, ConversationId, RootKey};

use super::ask::{Chain, Loop, Refused};
use super::bundle::{Manifest, Section};

/// Why there is nothing to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescribeError {
    /// No record.
    #[error("conversation {0} is not known here")]
    Unknown(ConversationId),
    /// A record that says nothing to this build.
    #[error("the record of conversation {0} is of another release and leads to no blocks")]
    Record(ConversationId),
    /// The loop says no.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Under which root each block of a conversation is stored: the first ones may be every tenant's.
#[derive(Debug, Clone)]
pub struct Roots {
    own: RootKey,
    shared: Option<(RootKey, HashSet<BlockKey>)>,
}

impl Roots {
    /// Of a chain of full blocks and what follows it.
    pub fn of(chain: &Chain) -> Self {
        let Start { root: own, shared, .. } = chain.start;
        let first = |blocks: u32| chain.keys.iter().take(blocks as usize).copied().collect();
        Self { own, shared: shared.map(|shared| (shared.root, first(shared.blocks))) }
    }

    /// Of a block of the conversation.
    pub fn of_block(&self, key: &BlockKey) -> RootKey {
        match &self.shared {
            Some((root, keys)) if keys.contains(key) => *root,
            _ => self.own,
        }
    }
}

/// A conversation as it is here.
#[derive(Debug, Clone)]
pub struct Description {
    /// Shape, names, sizes.
    pub manifest: Manifest,
    /// Its record's bytes.
    pub record: Arc<[u8]>,
    /// Of the record's full blocks, here or not.
    pub chain: Vec<BlockKey>,
    /// Blocks that are here, in the order of tokens, tails last.
    pub keys: Vec<BlockKey>,
    /// Under which root each is stored.
    pub roots: Roots,
}

impl Description {
    /// Asks the loop.
    pub async fn of(state: &Loop, id: ConversationId) -> Result<Self, DescribeError> {
        let kept = state.record(id).await?.ok_or(DescribeError::Unknown(id))?;
        let model = state.model().await?;
        let record = Record::decode(&kept.record).map_err(|_| DescribeError::Record(id))?;
        let chain = Chain::of(&record);
        let (full, roots) = (chain.keys.clone(), Roots::of(&chain));
        let keys = state.present(chain).await?;
        let manifest = Manifest {
            geometry: model.geometry,
            fingerprint: model.fingerprint,
            root: record.root,
            conversation: id,
            updated_ms: kept.updated_ms,
            record_bytes: kept.record.len() as u32,
            keys: keys.len() as u32,
        };
        Ok(Self { manifest, record: kept.record, chain: full, keys, roots })
    }

    /// As a bundle without blocks.
    pub fn into_sections(self) -> [Section; 4] {
        let manifest = Manifest { keys: self.keys.len() as u32, ..self.manifest };
        [
            Section::Manifest(manifest),
            Section::Record(self.record.to_vec()),
            Section::Keys(self.keys),
            Section::End { blocks: 0, absent: 0 },
        ]
    }
}
