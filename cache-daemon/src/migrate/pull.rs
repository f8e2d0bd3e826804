//! An import: gets of a conversation what is not here, from wherever it is.
//!
//! 1. Record and names of blocks. The record is kept at once: what arrives is of use even if the rest never does.
//! 2. As long as blocks are missing here: some of them, in the order of tokens, each checked and placed.
//!
//! A source that fails is asked again, for what is still missing, a bounded number of times in a row.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kv_protocol::message::CommitOutcome;
use kv_protocol::record::Record;
use kv_protocol::{BlockKey, ConversationId, Geometry, RootKey};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use super::ask::{Chain, Kept, Loop, Model, Refused};
use super::bundle::{BlockBytes, BundleError, Manifest, Section};
use super::describe::Roots;
use super::pace::Pace;
use super::secret::SecretError;
use super::server::BATCH_MAX;
use crate::metrics::Metrics;

/// Failures in a row before a transfer is given up; a block that arrives begins a new row.
const FAILURES_MAX: u32 = 7;
/// A source that says nothing counts as so many failures: the second silence in a row is the last.
const SILENCE_WEIGHT: u32 = 4;
/// Pause after the first failure, doubled up to [`PAUSE_MAX`]: a killed worker serves again within seconds.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// Imports that move blocks at once; others wait with their records kept. Each has up to three blocks in memory.
const IMPORTS_MAX: usize = 4;
/// How long a block may wait for a frame that nobody needs sooner.
const PLACE_MAX: Duration = Duration::from_secs(30);

/// Where a conversation comes from: another daemon, or a store.
pub trait Source: Sync {
    /// What it knows of a conversation.
    fn describe(
        &self,
        id: ConversationId,
    ) -> impl Future<Output = Result<Described, SourceError>> + Send;

    /// Gives each of these blocks to `into`, or its absence.
    fn blocks(
        &self,
        geometry: &Geometry,
        root: &RootKey,
        keys: &[BlockKey],
        into: &mpsc::Sender<Arrived>,
    ) -> impl Future<Output = Result<(), SourceError>> + Send;
}

/// What a source knows of a conversation.
#[derive(Debug, Clone)]
pub struct Described {
    /// Of its model, and itself.
    pub manifest: Manifest,
    /// Its record's bytes.
    pub record: Arc<[u8]>,
    /// Blocks that the source has, in the order of tokens.
    pub keys: Vec<BlockKey>,
}

/// A block, or that it is gone.
#[derive(Debug)]
pub enum Arrived {
    /// Its bytes, to be checked.
    Block(BlockBytes),
    /// Of the source.
    Absent(BlockKey),
}

/// What went wrong with a source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The network, or the other process.
    #[error("{address}: {message}")]
    Wire {
        /// Of the source.
        address: String,
        /// What failed.
        message: String,
    },
    /// Nothing came.
    #[error("{address} said nothing for {} s", waited.as_secs())]
    Silent {
        /// Of the source.
        address: String,
        /// How long.
        waited: Duration,
    },
    /// It does not know the conversation.
    #[error("{place} has no such conversation")]
    Unknown {
        /// The source.
        place: String,
    },
    /// It said no.
    #[error("{address} refused ({status}): {sentence}")]
    Refused {
        /// Of the source.
        address: String,
        /// Of HTTP.
        status: u16,
        /// Its words.
        sentence: String,
    },
    /// What came is no bundle, or not of this source.
    #[error("what arrived is not what was sent: {0}")]
    Bundle(#[from] BundleError),
    /// A bundle with other parts.
    #[error("the source's answer has other sections than were asked for")]
    Unexpected,
    /// A block with a wrong header or row.
    #[error("block {key} arrived spoilt")]
    Spoilt {
        /// Asked for.
        key: BlockKey,
    },
    /// Another block, or none.
    #[error("the source sent a block that was not asked for, or no block at all")]
    Unasked,
    /// No secret to sign with.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// No random numbers.
    #[error("no random numbers: {0}")]
    Random(std::io::Error),
}

impl SourceError {
    /// Whether it may be otherwise next time.
    fn may_pass(&self) -> bool {
        match self {
            Self::Refused { status, .. } => *status >= 500,
            Self::Bundle(BundleError::Version { .. }) | Self::Secret(_) | Self::Unknown { .. } => {
                false
            }
            _ => true,
        }
    }
}

/// Why a conversation was not imported, or not all of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// This daemon says no.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It is of another model.
    #[error(
        "conversation {conversation} is of the model {theirs} ({their_geometry}), this daemon serves {ours} ({our_geometry})"
    )]
    OtherModel {
        /// Which.
        conversation: ConversationId,
        /// Fingerprint at the source.
        theirs: kv_protocol::Fingerprint,
        /// Shape there.
        their_geometry: Box<Geometry>,
        /// Fingerprint here.
        ours: kv_protocol::Fingerprint,
        /// Shape here.
        our_geometry: Box<Geometry>,
    },
    /// The record does not belong to the conversation.
    #[error("the source gave conversation {conversation} a record that is not its own: {message}")]
    Record {
        /// Which.
        conversation: ConversationId,
        /// How it was seen.
        message: String,
    },
    /// The source failed, once for all or too often.
    #[error("after {} of {} blocks: {error}", progress.arrived, progress.missing)]
    Source {
        /// The last failure.
        error: SourceError,
        /// Until then; what arrived is of use.
        progress: Box<Report>,
    },
    /// Nothing may be displaced here.
    #[error(
        "after {} of {} blocks: no frame was free for {} s that no waiting turn needs; ask again later",
        progress.arrived, progress.missing, PLACE_MAX.as_secs()
    )]
    NoRoom {
        /// Until then; what arrived is of use.
        progress: Box<Report>,
    },
}

/// What an import did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Blocks that the source has of the conversation.
    pub blocks: u64,
    /// Of those, not here before.
    pub missing: u64,
    /// Arrived and kept.
    pub arrived: u64,
    /// Gone at the source before they were sent.
    pub absent: u64,
    /// Arrived, with headers.
    pub bytes: u64,
    /// Times that the source failed and was asked again.
    pub retries: u64,
    /// Whether the record is the newest here.
    pub record_kept: bool,
}

impl Described {
    /// Of the first sections of a bundle.
    pub fn new(manifest: Section, record: Section, keys: Section) -> Result<Self, SourceError> {
        let parts = (manifest, record, keys);
        let (Section::Manifest(manifest), Section::Record(record), Section::Keys(keys)) = parts
        else {
            return Err(SourceError::Unexpected);
        };
        let told = (manifest.record_bytes as usize, manifest.keys as usize);
        if told != (record.len(), keys.len()) {
            return Err(SourceError::Unexpected);
        }
        Ok(Self { manifest, record: record.into(), keys })
    }
}

/// The end of all imports of this daemon.
#[derive(Clone)]
pub struct Puller {
    /// This daemon's state.
    pub state: Loop,
    /// Of all arriving blocks together.
    pub pace: Pace,
    /// Where imports are counted.
    pub metrics: Arc<Metrics>,
    /// Imports at once.
    places: Arc<Semaphore>,
}

/// One import under way.
struct Pull<'a, S> {
    puller: &'a Puller,
    source: &'a S,
    described: Described,
    roots: Roots,
    /// Not to be asked for again.
    absent: HashSet<BlockKey>,
    report: Report,
    shown: &'a watch::Sender<Report>,
}

/// Why a batch ended early.
enum Ended {
    Source(SourceError),
    Refused(Refused),
    NoRoom,
}

impl Puller {
    /// Without anything under way.
    pub fn new(state: Loop, pace: Pace, metrics: Arc<Metrics>) -> Self {
        Self { state, pace, metrics, places: Arc::new(Semaphore::new(IMPORTS_MAX)) }
    }

    /// Imports a conversation; `shown` sees how far it is.
    pub async fn pull(
        &self,
        source: &impl Source,
        id: ConversationId,
        shown: &watch::Sender<Report>,
    ) -> Result<Report, PullError> {
        let result = self.try_pull(source, id, shown).await;
        let end = if result.is_ok() { "done" } else { "failed" };
        self.metrics.imports.with_label_values(&[end]).inc();
        result
    }

    async fn try_pull(
        &self,
        source: &impl Source,
        id: ConversationId,
        shown: &watch::Sender<Report>,
    ) -> Result<Report, PullError> {
        self.state.model().await?; // Without one nothing can be kept: not a reason to ask.
        let (mut report, mut failures) = (Report::default(), 0);
        let described = loop {
            match source.describe(id).await {
                Ok(described) => break described,
                Err(error) => pause(error, &mut failures, &mut report).await?,
            }
        };
        report.record_kept = self.keep(id, &described).await?;
        self.blocks(source, described, report, shown).await
    }

    /// Keeps a record, if what the source told is of this conversation and this daemon's model. Whether it is
    /// the newest here.
    pub async fn keep(&self, id: ConversationId, described: &Described) -> Result<bool, PullError> {
        check(id, described, &self.state.model().await?)?;
        let updated_ms = described.manifest.updated_ms;
        let kept = Kept { updated_ms, record: described.record.clone() };
        Ok(self.state.put_record(id, kept).await?)
    }

    /// Gets the blocks that are not here, of a conversation whose record is kept.
    pub async fn blocks(
        &self,
        source: &impl Source,
        described: Described,
        mut report: Report,
        shown: &watch::Sender<Report>,
    ) -> Result<Report, PullError> {
        report.blocks = described.keys.len() as u64;
        let Ok(_place) = self.places.acquire().await else {
            return Err(Refused::Stopping.into()); // Never closed.
        };
        let record = Record::decode(&described.record).map_err(|error| PullError::Record {
            conversation: described.manifest.conversation,
            message: error.to_string(),
        })?;
        let (roots, absent) = (Roots::of(&Chain::of(&record)), HashSet::new());
        Pull { puller: self, source, described, roots, absent, report, shown }.run().await
    }
}

impl<S: Source> Pull<'_, S> {
    async fn run(mut self) -> Result<Report, PullError> {
        let mut failures = 0;
        let mut is_first = true;
        loop {
            let mut missing = self.puller.state.missing(self.described.keys.clone()).await?;
            missing.retain(|key| !self.absent.contains(key));
            if std::mem::take(&mut is_first) {
                self.report.missing = missing.len() as u64;
                self.shown.send_replace(self.report.clone());
            }
            if missing.is_empty() {
                return Ok(self.report);
            }
            let root = self.roots.of_block(&missing[0]);
            missing.retain(|key| self.roots.of_block(key) == root);
            missing.truncate(BATCH_MAX);
            let arrived_before = self.report.arrived;
            let ended = self.batch(root, &missing).await;
            if self.report.arrived > arrived_before {
                failures = 0;
            }
            match ended {
                Ok(()) => {}
                Err(Ended::Source(error)) => {
                    pause(error, &mut failures, &mut self.report).await?;
                }
                Err(Ended::Refused(refused)) => return Err(refused.into()),
                Err(Ended::NoRoom) => {
                    return Err(PullError::NoRoom { progress: self.report.into() });
                }
            }
        }
    }

    /// The source sends while the last block is being placed; one block waits in between.
    async fn batch(&mut self, root: RootKey, keys: &[BlockKey]) -> Result<(), Ended> {
        let (into, mut arriving) = mpsc::channel(1);
        let geometry = self.described.manifest.geometry;
        let source = self.source;
        // What it sent before it failed is still placed; a block that cannot be placed ends it at once.
        let send = async move {
            let sent = source.blocks(&geometry, &root, keys, &into).await;
            Ok::<_, Ended>(sent)
        };
        let place = async {
            let mut asked: HashSet<BlockKey> = keys.iter().copied().collect();
            while let Some(arrived) = arriving.recv().await {
                self.arrived(arrived, &mut asked).await?;
            }
            Ok(asked)
        };
        let (sent, unsent) = tokio::try_join!(send, place)?;
        sent.map_err(Ended::Source)?;
        if unsent.is_empty() { Ok(()) } else { Err(Ended::Source(SourceError::Unasked)) }
    }

    async fn arrived(
        &mut self,
        arrived: Arrived,
        asked: &mut HashSet<BlockKey>,
    ) -> Result<(), Ended> {
        let unasked = Ended::Source(SourceError::Unasked);
        let block = match arrived {
            Arrived::Absent(key) => {
                if !asked.remove(&key) {
                    return Err(unasked);
                }
                self.absent.insert(key);
                self.report.absent += 1;
                return Ok(());
            }
            Arrived::Block(block) => block,
        };
        let Manifest { geometry, conversation, .. } = &self.described.manifest;
        let Ok((header, _)) = block.split(geometry) else { return Err(unasked) };
        let key = header.key;
        if !asked.remove(&key) || header.root != self.roots.of_block(&key) {
            return Err(unasked);
        }
        let bytes = block.size_bytes();
        self.puller.pace.wait(bytes).await;
        let placed = self.puller.state.place(*conversation, header, block);
        match timeout(PLACE_MAX, placed).await {
            Err(_) => Err(Ended::NoRoom),
            Ok(Err(refused)) => Err(Ended::Refused(refused)),
            Ok(Ok(CommitOutcome::Refused)) => Err(Ended::Source(SourceError::Spoilt { key })),
            Ok(Ok(CommitOutcome::Stored | CommitOutcome::Known)) => {
                self.report.arrived += 1;
                self.report.bytes += bytes;
                self.shown.send_replace(self.report.clone());
                self.puller.metrics.imported_blocks.inc();
                self.puller.metrics.imported_bytes.inc_by(bytes);
                Ok(())
            }
        }
    }
}

/// Waits before a source is asked again; an error if it is not to be.
async fn pause(
    error: SourceError,
    failures: &mut u32,
    report: &mut Report,
) -> Result<(), PullError> {
    let is_silence = matches!(error, SourceError::Silent { .. });
    *failures += if is_silence { SILENCE_WEIGHT } else { 1 };
    if *failures >= FAILURES_MAX || !error.may_pass() {
        return Err(PullError::Source { error, progress: report.clone().into() });
    }
    tracing::info!(%error, failures, "the source of an import failed: asking again");
    report.retries += 1;
    tokio::time::sleep(PAUSE_MAX.min(PAUSE_MIN * 2u32.pow(*failures - 1))).await; // At most 2^6.
    Ok(())
}

/// Whether what a source tells of is what was asked for, and can be used here.
fn check(id: ConversationId, described: &Described, ours: &Model) -> Result<(), PullError> {
    let Manifest { geometry, fingerprint, root, conversation, .. } = described.manifest;
    if (geometry, fingerprint) != (ours.geometry, ours.fingerprint) {
        return Err(PullError::OtherModel {
            conversation: id,
            theirs: fingerprint,
            their_geometry: Box::new(geometry),
            ours: ours.fingerprint,
            our_geometry: Box::new(ours.geometry),
        });
    }
    let wrong = |message: String| PullError::Record { conversation: id, message };
    let record = Record::decode(&described.record).map_err(|error| wrong(error.to_string()))?;
    let named = ConversationId::new(&record.root, record.name.as_bytes());
    if conversation != id || named != id || record.root != root {
        return Err(wrong(format!("it is of {named}")));
    }
    Ok(())
}
