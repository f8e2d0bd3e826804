//! Conversations in an object store: what lies where, and how it is put, got and deleted.
//!
//! | object | content (docs/migration.md) |
//! | --- | --- |
//! | `PREFIX/v1/conversations/ID` | manifest, record, keys, end |
//! | `PREFIX/v1/blocks/ROOT/KEY` | block, end |
//!
//! A block's name says its content, so its object never changes and may be put twice. Blocks are put before
//! the record that names them, and deleted before it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kv_protocol::{BlockKey, ConversationId, Geometry, RootKey};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, Error as StoreError, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::migrate::ask::{Loop, Refused};
use crate::migrate::bundle::{
    BlockBytes, Decoder, Encoder, SECTION_HEADER_BYTES, SealKey, Section,
};
use crate::migrate::describe::{DescribeError, Description};
use crate::migrate::pace::Pace;
use crate::migrate::pull::{Arrived, Described, Source, SourceError};
use crate::migrate::secret::hex;
use crate::tier::remote::RemoteUrl;

/// Objects on their way at once, in each direction of one conversation.
const OBJECTS_AT_ONCE: usize = 4;
/// How long a connection may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How long one object may take, tries and all.
const OBJECT_MAX: Duration = Duration::from_secs(30);
/// Tries of one request, after the first.
const RETRIES_MAX: usize = 3;
/// Bytes of a record's object: manifest, the largest record, the longest list.
const DESCRIPTION_BYTES_MAX: u64 = 4 << 20;

/// Why an object was not put, got or deleted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The store said no.
    #[error("remote tier {url}: {what}: {message}")]
    Store {
        /// Where.
        url: String,
        /// What was tried.
        what: &'static str,
        /// Its words.
        message: String,
    },
    /// The store said nothing.
    #[error("remote tier {url}: {what}: nothing for {} s", waited.as_secs())]
    Silent {
        /// Where.
        url: String,
        /// What was tried.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// This daemon says no.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Nothing to offload.
    #[error(transparent)]
    Describe(#[from] DescribeError),
}

/// What an offload did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Offloaded {
    /// Blocks of the conversation that are here.
    pub blocks: u64,
    /// Of those, put now; the others were there.
    pub put: u64,
    /// Put, with headers.
    pub bytes: u64,
}

/// See the module.
#[derive(Clone)]
pub struct RemoteStore {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    url: Arc<str>,
    pace: Pace,
}

impl RemoteStore {
    /// Opens a place; nothing is asked of it yet. Credentials, region and endpoint of S3 come from the
    /// environment (`AWS_ACCESS_KEY_ID` and so on).
    pub fn open(url: &RemoteUrl, pace: Pace) -> Result<Self, RemoteError> {
        let name: Arc<str> = url.to_string().into();
        let failed = |error: &dyn std::error::Error| RemoteError::Store {
            url: name.to_string(),
            what: "opening it",
            message: error.to_string(),
        };
        let (store, prefix): (Arc<dyn ObjectStore>, &str) = match url {
            RemoteUrl::Folder(folder) => {
                std::fs::create_dir_all(folder).map_err(|error| failed(&error))?;
                let folder = LocalFileSystem::new_with_prefix(folder);
                (Arc::new(folder.map_err(|error| failed(&error))?), "")
            }
            RemoteUrl::S3 { bucket, prefix } => {
                (Arc::new(s3(bucket).map_err(|error| failed(&error))?), prefix)
            }
        };
        let prefix = Path::parse(prefix).map_err(|error| failed(&error))?;
        Ok(Self { store, prefix, url: name, pace })
    }

    fn of_conversation(&self, id: &ConversationId) -> Path {
        self.prefix.clone().join("v1").join("conversations").join(hex(&id.0))
    }

    fn of_block(&self, root: &RootKey, key: &BlockKey) -> Path {
        self.prefix.clone().join("v1").join("blocks").join(hex(&root.0)).join(hex(&key.0))
    }

    /// Waits for the store no longer than one object may take; what is not there is `None`.
    async fn patiently<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<Option<T>, RemoteError> {
        let url = || self.url.to_string();
        match timeout(OBJECT_MAX, call).await {
            Ok(Ok(done)) => Ok(Some(done)),
            Ok(Err(StoreError::NotFound { .. })) => Ok(None),
            Ok(Err(error)) => {
                Err(RemoteError::Store { url: url(), what, message: error.to_string() })
            }
            Err(_) => Err(RemoteError::Silent { url: url(), what, waited: OBJECT_MAX }),
        }
    }

    /// An object of at most `bytes_max` bytes.
    async fn get(
        &self,
        what: &'static str,
        path: &Path,
        bytes_max: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        let got = self.patiently(what, async {
            let found = self.store.get(path).await?;
            if found.meta.size > bytes_max {
                return Ok(Bytes::new()); // Of somebody else; it decodes as nothing.
            }
            found.bytes().await
        });
        got.await
    }

    async fn put(&self, path: &Path, sections: Vec<Section>) -> Result<u64, RemoteError> {
        let mut encoder = Encoder::new(SealKey::of_objects());
        let mut pieces = Vec::new();
        for section in sections {
            let (header, body) = encoder.section(section);
            pieces.extend([Bytes::copy_from_slice(&header), body]);
        }
        let payload: PutPayload = pieces.into_iter().collect();
        let bytes = payload.content_length() as u64;
        self.pace.wait(bytes).await;
        self.patiently("putting an object", self.store.put(path, payload)).await?;
        Ok(bytes)
    }

    async fn delete(&self, path: Path) -> Result<(), RemoteError> {
        self.patiently("deleting an object", self.store.delete(&path)).await.map(|_| ())
    }

    /// What is there of a conversation; bytes that are no bundle are nothing.
    async fn described(&self, id: &ConversationId) -> Result<Option<Described>, RemoteError> {
        let path = self.of_conversation(id);
        let bytes = self.get("getting a record", &path, DESCRIPTION_BYTES_MAX).await?;
        let Some(bytes) = bytes else { return Ok(None) };
        let sections = decode(&bytes, None).ok();
        let parts = sections.and_then(|sections| <[Section; 4]>::try_from(sections).ok());
        let described = parts
            .and_then(|[manifest, record, keys, _]| Described::new(manifest, record, keys).ok());
        if described.is_none() {
            tracing::warn!(%id, url = %self.url, "the remote tier's record is not readable");
        }
        Ok(described)
    }

    /// Puts a conversation there: the blocks that this daemon has, then the record.
    pub async fn offload(
        &self,
        state: &Loop,
        id: ConversationId,
    ) -> Result<Offloaded, RemoteError> {
        let mut description = Description::of(state, id).await?;
        let before = self.described(&id).await?;
        let root = description.manifest.root;
        let named = |key: &BlockKey| (description.roots.of_block(key), *key);
        let names: Vec<_> = description.keys.iter().map(named).collect();
        let puts = names.into_iter().map(|(root, key)| self.put_block(state, root, key));
        let puts: Vec<Option<u64>> =
            futures::stream::iter(puts).buffered(OBJECTS_AT_ONCE).try_collect().await?;
        let offloaded = Offloaded {
            blocks: description.keys.len() as u64,
            put: puts.iter().flatten().count() as u64,
            bytes: puts.iter().flatten().sum(),
        };
        let (updated_ms, there) =
            before.map_or((0, Vec::new()), |before| (before.manifest.updated_ms, before.keys));
        if updated_ms <= description.manifest.updated_ms {
            let outgrown = merge(&mut description, there);
            self.put(&self.of_conversation(&id), description.into_sections().into()).await?;
            for key in outgrown {
                self.delete(self.of_block(&root, &key)).await?;
            }
        }
        // Deleted while we were at it: what was put must go again.
        if let Err(refused @ Refused::Deleted(_)) = state.record(id).await {
            self.delete_conversation(state, &id, None).await?;
            return Err(refused.into());
        }
        Ok(offloaded)
    }

    /// `None` if it is there already, or gone here.
    async fn put_block(
        &self,
        state: &Loop,
        root: RootKey,
        key: BlockKey,
    ) -> Result<Option<u64>, RemoteError> {
        let path = self.of_block(&root, &key);
        if self.patiently("looking for a block", self.store.head(&path)).await?.is_some() {
            return Ok(None);
        }
        let Some(block) = state.copy(key, root).await? else { return Ok(None) };
        let end = Section::End { blocks: 1, absent: 0 };
        Ok(Some(self.put(&path, vec![Section::Block(block), end]).await?))
    }

    /// Deletes a conversation's objects, its record last: as long as that is there, the rest can be found.
    /// Blocks that records here share stay, and so do those that the operator declared as every tenant's:
    /// they lie under another root. `known` are nobody else's, whatever the record says.
    pub async fn delete_conversation(
        &self,
        state: &Loop,
        id: &ConversationId,
        known: Option<&(RootKey, Vec<BlockKey>)>,
    ) -> Result<(), RemoteError> {
        let mut all = HashSet::new();
        if let Some(Described { manifest, keys, .. }) = self.described(id).await? {
            let unowned = state.unowned(keys).await?;
            all.extend(unowned.into_iter().map(|key| (manifest.root, key)));
        }
        all.extend(known.iter().flat_map(|(root, keys)| keys.iter().map(|key| (*root, *key))));
        let paths: Vec<Path> = all.iter().map(|(root, key)| self.of_block(root, key)).collect();
        let deletes = paths.into_iter().map(|path| self.delete(path));
        let deletes = futures::stream::iter(deletes).buffer_unordered(OBJECTS_AT_ONCE);
        deletes.try_collect::<()>().await?;
        self.delete(self.of_conversation(id)).await
    }
}

/// Blocks of the conversation that left this daemon and are there stay listed. What is there and belongs to
/// the conversation no more, outgrown tails above all, is given back.
fn merge(description: &mut Description, there: Vec<BlockKey>) -> Vec<BlockKey> {
    let full: HashSet<BlockKey> = description.chain.iter().copied().collect();
    let here: HashSet<BlockKey> = description.keys.iter().copied().collect();
    let (stay, outgrown): (HashSet<BlockKey>, HashSet<BlockKey>) =
        there.into_iter().filter(|key| !here.contains(key)).partition(|key| full.contains(key));
    let tails = description.keys.iter().filter(|key| !full.contains(key)).copied();
    let chain = description.chain.iter().copied();
    description.keys =
        chain.filter(|key| here.contains(key) || stay.contains(key)).chain(tails).collect();
    outgrown.into_iter().collect()
}

fn s3(bucket: &str) -> Result<impl ObjectStore, StoreError> {
    // Once in a process; whoever was first, is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let limit =
        |key, time: Duration| (AmazonS3ConfigKey::Client(key), format!("{} s", time.as_secs()));
    let (connect, connect_max) = limit(ClientConfigKey::ConnectTimeout, CONNECT_MAX);
    let (object, object_max) = limit(ClientConfigKey::Timeout, OBJECT_MAX);
    AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_config(connect, connect_max)
        .with_config(object, object_max)
        .with_retry(RetryConfig {
            max_retries: RETRIES_MAX,
            retry_timeout: OBJECT_MAX,
            ..RetryConfig::default()
        })
        .build()
}

/// All sections of an object.
fn decode(mut bytes: &[u8], geometry: Option<Geometry>) -> Result<Vec<Section>, SourceError> {
    let mut decoder = Decoder::new(SealKey::of_objects(), geometry);
    let mut sections = Vec::new();
    while let Some(section) = decoder.next(&mut bytes)? {
        sections.push(section);
    }
    decoder.finish()?;
    Ok(sections)
}

impl Source for RemoteStore {
    async fn describe(&self, id: ConversationId) -> Result<Described, SourceError> {
        let described = self.described(&id).await.map_err(|error| self.failed(&error))?;
        described.ok_or_else(|| SourceError::Unknown { place: self.url.to_string() })
    }

    async fn blocks(
        &self,
        geometry: &Geometry,
        root: &RootKey,
        keys: &[BlockKey],
        into: &mpsc::Sender<Arrived>,
    ) -> Result<(), SourceError> {
        let keys: Vec<BlockKey> = keys.to_vec();
        let gets = keys.into_iter().map(|key| self.get_block(*geometry, *root, key));
        let mut gets = futures::stream::iter(gets).buffered(OBJECTS_AT_ONCE);
        while let Some(arrived) = gets.next().await {
            if into.send(arrived?).await.is_err() {
                return Ok(()); // Who wanted them has said why not.
            }
        }
        Ok(())
    }
}

impl RemoteStore {
    /// Spoilt objects are absent: they do not get better by asking again.
    async fn get_block(
        &self,
        geometry: Geometry,
        root: RootKey,
        key: BlockKey,
    ) -> Result<Arrived, SourceError> {
        let bytes_max = BlockBytes::len_of(&geometry) + 3 * SECTION_HEADER_BYTES;
        let path = self.of_block(&root, &key);
        let bytes = self.get("getting a block", &path, bytes_max as u64).await;
        let Some(bytes) = bytes.map_err(|error| self.failed(&error))? else {
            return Ok(Arrived::Absent(key));
        };
        let sections = decode(&bytes, Some(geometry)).unwrap_or_default();
        Ok(match sections.into_iter().next() {
            Some(Section::Block(block)) if is_block(&block, &geometry, &key) => {
                Arrived::Block(block)
            }
            _ => {
                tracing::warn!(%key, url = %self.url, "the remote tier's block is spoilt");
                Arrived::Absent(key)
            }
        })
    }

    fn failed(&self, error: &RemoteError) -> SourceError {
        SourceError::Wire { address: self.url.to_string(), message: error.to_string() }
    }
}

fn is_block(block: &BlockBytes, geometry: &Geometry, key: &BlockKey) -> bool {
    block.split(geometry).is_ok_and(|(header, _)| header.key == *key)
}
