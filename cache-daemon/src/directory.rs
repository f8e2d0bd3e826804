//! The directory: which blocks exist, what they follow, and in which tiers they are. Pure data.
//!
//! Blocks are nodes of trees, in one dense array: a node is named by its [`EntryId`], four bytes instead of
//! a key's 32, by its relatives and by the policies. 80 bytes a block, and 10 in the table from keys to ids
//! (`make bench-index` measures the whole process).
//!
//! **Invariants** (checked by `Directory::self_check` in tests)
//! - A node has a block exactly while the block is in at least one tier; a node without one (a root, or
//!   a parent that has left or has not come yet) has children.
//! - The children of a node are exactly the known blocks with that parent: the full ones, and the partial
//!   ones that make open children ("Tail blocks").
//! - A partial block never has children: its key is nobody's parent. Its tokens are in `tails`; those of a
//!   full block are only in its header.
//! - The id of a node that left is not given to another before the next `take_changed`.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::Arc;

use hashbrown::HashTable;
use kv_protocol::message::KeyList;
use kv_protocol::{BlockHeader, BlockKey, FrameIndex, MissReason, NumericsTag, RootKey, Variant};

use crate::key_map::{KeyMap, KeyState};
use crate::outline::Outline;
use crate::policy::{Keep, Known, QueueTicket, TenantId};
use crate::tier::disk::StoredBlock;

/// Blocks whose leaving is remembered, to name the reason of a later miss.
const GONE_MAX: usize = 1 << 16;
/// Tenants' parts behind shared prompts whose depth is known: a tenant for each declared prompt.
const BRANCHES_MAX: usize = 1 << 14;
/// Open children offered for a chain whose next tokens only the runtime knows.
const CANDIDATES_MAX: usize = 4;
/// Children of one parent that are looked at, the newest first: a popular prefix may have thousands.
const CHILDREN_SCANNED_MAX: usize = 256;
/// Depth of a block of whose chain a part is not known: it leaves before those that can be reached.
const DEPTH_UNKNOWN: u32 = u32::MAX;

/// A node's place in the directory's array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(pub u32);

impl EntryId {
    const NONE: Self = Self(u32::MAX);

    fn index(self) -> usize {
        self.0 as usize
    }

    fn some(self) -> Option<Self> {
        (self != Self::NONE).then_some(self)
    }
}

/// Where a block stands with the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDisk {
    /// Not there.
    Absent,
    /// A write is under way.
    Writing,
    /// There.
    Stored,
}

/// What many blocks have in common; two blocks of one key may stand for each other if it is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Label {
    /// Model and tenant.
    pub root: RootKey,
    /// How they were computed.
    pub variant: Variant,
    /// With which arithmetic.
    pub numerics: NumericsTag,
    /// What each takes on disk.
    pub disk_bytes: u64,
}

/// What a header says of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The full block before, or the root.
    pub parent: BlockKey,
    /// In common with others.
    pub label: Label,
    /// Ids of its tokens; of a full block that was found on disk only the first.
    pub tokens: Arc<[u32]>,
    /// Whether all token places are taken.
    pub is_full: bool,
}

impl Description {
    /// Of a block that takes `disk_bytes` on disk.
    pub fn of(header: &BlockHeader, is_full: bool, disk_bytes: u64) -> Self {
        let BlockHeader { parent, root, variant, numerics, .. } = *header;
        let label = Label { root, variant, numerics, disk_bytes };
        Self { parent, label, tokens: header.tokens.as_slice().into(), is_full }
    }

    /// Of a block that was found on disk.
    pub fn of_stored(block: StoredBlock) -> Self {
        let StoredBlock { parent, root, variant, numerics, tokens, is_full, bytes, .. } = block;
        Self {
            parent,
            label: Label { root, variant, numerics, disk_bytes: bytes },
            tokens,
            is_full,
        }
    }
}

/// A known block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Last commit, lookup or promote; Unix milliseconds.
    pub used_ms: u64,
    /// Its frame, if it is in the host tier.
    pub host: Option<FrameIndex>,
    label: u32,
    first_token: u32,
    depth: u32,
    /// Where it stands with the disk.
    pub disk: OnDisk,
    /// Whether all token places are taken.
    pub is_full: bool,
    /// A hint brought it from disk, and no lookup has found it since. The first one that does is told
    /// `Disk`: that is where its turn's KV was kept, however early the hint was.
    pub hinted: bool,
    /// It, or what it continues, was read again after it was made, or made again after it had left.
    pub reused: bool,
}

impl Block {
    /// Whether it is on disk.
    pub fn is_stored(&self) -> bool {
        self.disk == OnDisk::Stored
    }
}

#[derive(Debug)]
struct Node {
    key: BlockKey,
    parent: EntryId,
    newest_child: EntryId,
    older: EntryId,
    newer: EntryId,
    block: Option<Block>,
}

const _: () = assert!(size_of::<Node>() == 80, "the size of a node is the size of the directory");

/// Part of a chain: place and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// In blocks from the chain's start.
    pub index: u32,
    /// Name.
    pub key: BlockKey,
    /// The same, here and now.
    pub id: EntryId,
}

/// What a lookup found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    /// The longest known prefix, then open children of its last block (all with the same index).
    pub links: Vec<Link>,
    /// Why the prefix ends before the list does.
    pub miss: Option<MissReason>,
    /// When the block that is missing left, if it was here; milliseconds.
    pub gone_ms: Option<u64>,
}

/// Labels in use, counted, and the tenants whose they are.
#[derive(Debug, Default)]
struct Labels {
    interned: Vec<(Label, u32, TenantId)>,
    ids: HashMap<Label, u32>,
    vacant: Vec<u32>,
    tenants: Tenants,
}

/// Roots in use, by how many labels.
#[derive(Debug, Default)]
struct Tenants {
    ids: HashMap<RootKey, (TenantId, u32)>,
    next: u16,
    vacant: Vec<TenantId>,
}

impl Tenants {
    fn take(&mut self, root: RootKey) -> TenantId {
        let (vacant, next) = (&mut self.vacant, &mut self.next);
        let (tenant, labels) = self.ids.entry(root).or_insert_with(|| {
            let fresh = TenantId(*next);
            if vacant.is_empty() && fresh != TenantId::CROWD {
                *next += 1;
            }
            (vacant.pop().unwrap_or(fresh), 0)
        });
        *labels += 1;
        *tenant
    }

    fn give_back(&mut self, root: &RootKey) {
        let Some((tenant, labels)) = self.ids.get_mut(root) else { return };
        *labels -= 1;
        if *labels == 0 {
            if *tenant != TenantId::CROWD {
                self.vacant.push(*tenant);
            }
            self.ids.remove(root);
        }
    }
}

impl Labels {
    fn take(&mut self, label: &Label) -> u32 {
        if let Some(id) = self.ids.get(label) {
            self.interned[*id as usize].1 += 1;
            return *id;
        }
        let id = self.vacant.pop().unwrap_or(self.interned.len() as u32);
        let interned = (*label, 1, self.tenants.take(label.root));
        if id as usize == self.interned.len() {
            self.interned.push(interned);
        } else {
            self.interned[id as usize] = interned;
        }
        self.ids.insert(*label, id);
        id
    }

    fn give_back(&mut self, id: u32) {
        let (label, blocks, _) = &mut self.interned[id as usize];
        *blocks -= 1;
        if *blocks == 0 {
            self.tenants.give_back(&label.root);
            self.ids.remove(label);
            self.vacant.push(id);
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Directory {
    nodes: Vec<Node>,
    ids: HashTable<EntryId>,
    hasher: KeyState,
    vacant: Vec<EntryId>,
    /// Left since the last `take_changed`.
    leaving: Vec<EntryId>,
    blocks: usize,
    labels: Labels,
    tails: HashMap<EntryId, Arc<[u32]>>,
    /// Why and when.
    gone: HashMap<u64, (MissReason, u64)>,
    gone_order: VecDeque<u64>,
    changed: Vec<EntryId>,
    now_ms: u64,
    /// What hangs under no block of its own chain, by its parent, and how deep it is: lists tell.
    branches: KeyMap<u32>,
}

impl Directory {
    /// Learns from a list how deep what hangs under an event is: no block has the event's name.
    pub fn learn_branches(&mut self, list: &KeyList) {
        let places = 1..=list.keys.len() as u32;
        for place in list.start.breaks().into_iter().filter(|place| places.contains(place)) {
            if self.branches.len() >= BRANCHES_MAX {
                self.branches.clear(); // They are told again with each list.
            }
            let parent = list.start.parent_of(place as usize, &list.keys);
            self.branches.insert(parent, place);
        }
    }

    /// What time it is, for what leaves from now on; milliseconds.
    pub fn tell_time(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    /// Known blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    fn node_of(&self, key: &BlockKey) -> Option<EntryId> {
        let is_it = |id: &EntryId| self.nodes[id.index()].key == *key;
        self.ids.find(self.hasher.hash_one(key), is_it).copied()
    }

    /// A known block's id.
    pub fn find(&self, key: &BlockKey) -> Option<EntryId> {
        self.node_of(key).filter(|id| self.at(*id).is_some())
    }

    /// A node by the first bytes of its key, whether it has a block or not.
    fn node_of_short(&self, short: u64) -> Option<EntryId> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&short.to_le_bytes());
        let is_it = |id: &EntryId| self.nodes[id.index()].key.short() == short;
        self.ids.find(self.hasher.hash_one(BlockKey(key)), is_it).copied() // The hash is of these bytes.
    }

    /// A known block under a root by the first bytes of its key.
    pub fn find_short(&self, short: u64, root: &RootKey) -> Option<(EntryId, &Block)> {
        let id = self.node_of_short(short)?;
        self.at(id).filter(|block| self.label(block).root == *root).map(|block| (id, block))
    }

    /// Why a block is not known, if that is.
    pub fn why_left(&self, short: u64) -> Option<MissReason> {
        self.gone.get(&short).map(|(reason, _)| *reason)
    }

    /// All known blocks that follow one, which need not be known itself. The newest first.
    pub fn followers(&self, short: u64) -> impl Iterator<Item = (EntryId, &Block)> {
        let parent = self.node_of_short(short);
        let first = parent.and_then(|id| self.nodes[id.index()].newest_child.some());
        let all = std::iter::successors(first, |id| self.nodes[id.index()].older.some());
        all.filter_map(|id| Some((id, self.at(id)?)))
    }

    /// Partial blocks that hold a conversation's end.
    pub fn ends_of(&self, outline: &Outline) -> impl Iterator<Item = (EntryId, &Block)> {
        let is_ours = |(id, block): &(EntryId, &Block)| {
            let tokens = self.tail(*id);
            self.label(block).root == outline.root && tokens.is_some_and(|ids| outline.is_tail(ids))
        };
        self.followers(outline.open).filter(is_ours)
    }

    /// What a known block follows.
    pub fn parent_key(&self, id: EntryId) -> Option<&BlockKey> {
        self.at(id)?;
        Some(&self.nodes[self.nodes[id.index()].parent.some()?.index()].key)
    }

    /// Ids of a partial block's tokens.
    pub fn tail(&self, id: EntryId) -> Option<&Arc<[u32]>> {
        self.tails.get(&id)
    }

    /// A block; `None` if it has left.
    pub fn at(&self, id: EntryId) -> Option<&Block> {
        self.nodes.get(id.index())?.block.as_ref()
    }

    /// A block, to change its tiers or its use.
    pub fn at_mut(&mut self, id: EntryId) -> Option<&mut Block> {
        self.changed.push(id);
        let node = self.nodes.get(id.index())?;
        let depth = match &node.block {
            Some(block) if block.depth == DEPTH_UNKNOWN => self.depth_under(node.parent, block),
            Some(block) => block.depth,
            None => return None,
        };
        let block = self.nodes[id.index()].block.as_mut()?;
        block.depth = depth; // Its parent may have come meanwhile.
        Some(block)
    }

    /// A block.
    pub fn get(&self, key: &BlockKey) -> Option<&Block> {
        self.at(self.node_of(key)?)
    }

    /// A block, to change its tiers or its use.
    pub fn get_mut(&mut self, key: &BlockKey) -> Option<&mut Block> {
        self.at_mut(self.node_of(key)?)
    }

    /// The block that another follows, if it is known.
    pub fn parent(&self, id: EntryId) -> Option<(&BlockKey, &Block)> {
        let parent = self.nodes.get(id.index())?.parent;
        let block = self.at(parent)?;
        Some((self.key(parent), block))
    }

    /// Name of a block; still there for those that have left since the last `take_changed`.
    pub fn key(&self, id: EntryId) -> &BlockKey {
        &self.nodes[id.index()].key
    }

    /// What a block has in common with others.
    pub fn label(&self, block: &Block) -> &Label {
        &self.labels.interned[block.label as usize].0
    }

    /// What policies may know of a block.
    pub fn known(&self, block: &Block, turn: Option<QueueTicket>) -> Known {
        Known {
            used_ms: block.used_ms,
            depth: block.depth,
            turn,
            tenant: self.labels.interned[block.label as usize].2,
            keep: Keep::Ordinary,
        }
    }

    /// Blocks that came, went or changed since the last call. Ids of those that went may be others' from
    /// now on.
    pub fn take_changed(&mut self) -> Vec<EntryId> {
        self.vacant.append(&mut self.leaving);
        std::mem::take(&mut self.changed)
    }

    /// All blocks.
    pub fn iter(&self) -> impl Iterator<Item = (&BlockKey, &Block)> {
        self.nodes.iter().filter_map(|node| Some((&node.key, node.block.as_ref()?)))
    }

    /// The blocks among `count` places from `from` on, and where the next ones begin; `None` at the end.
    /// For walks in bounded steps.
    pub fn part(&self, from: usize, count: usize) -> (Vec<EntryId>, Option<usize>) {
        let end = (from + count).min(self.nodes.len());
        let ids = (from..end).map(|place| EntryId(place as u32));
        let known = ids.filter(|id| self.at(*id).is_some()).collect();
        (known, (end < self.nodes.len()).then_some(end))
    }

    /// Places that [`Directory::part`] walks.
    pub fn places(&self) -> usize {
        self.nodes.len()
    }

    /// Adds a block that lies in a frame. It must be unknown.
    pub fn insert(
        &mut self,
        key: BlockKey,
        description: &Description,
        used_ms: u64,
        frame: FrameIndex,
    ) -> EntryId {
        let id = self.add(key, description, used_ms, Some(frame), OnDisk::Absent);
        self.changed.push(id);
        id
    }

    /// Adds a block that the index of the disk tier names, in whatever order it names them; policies are
    /// told when [`Directory::settle`] comes to it. It must be unknown.
    pub fn load(&mut self, key: BlockKey, description: &Description, used_ms: u64) -> EntryId {
        let id = self.add(key, description, used_ms, None, OnDisk::Stored);
        if let Some(block) = &mut self.nodes[id.index()].block {
            block.depth = DEPTH_UNKNOWN;
        }
        id
    }

    /// After a load: `count` places from `from` on learn their depths and count as changed. Where the next
    /// ones begin; `None` at the end.
    pub fn settle(&mut self, from: usize, count: usize) -> Option<usize> {
        let (ids, next) = self.part(from, count);
        for id in ids {
            let mut above = vec![id];
            while let Some(last) = above.last()
                && let node = &self.nodes[last.index()]
                && node.block.as_ref().is_some_and(|block| block.depth == DEPTH_UNKNOWN)
                && self.at(node.parent).is_some()
            {
                above.push(node.parent);
            }
            for id in above.into_iter().rev() {
                let node = &self.nodes[id.index()];
                let Some(block) = &node.block else { continue };
                if block.depth == DEPTH_UNKNOWN {
                    let depth = self.depth_under(node.parent, block);
                    if let Some(block) = &mut self.nodes[id.index()].block {
                        block.depth = depth;
                    }
                }
            }
            self.changed.push(id);
        }
        next
    }

    fn depth_under(&self, parent: EntryId, block: &Block) -> u32 {
        let is_root = || self.key(parent) == &self.label(block).root.as_parent();
        match self.at(parent) {
            Some(parent) => parent.depth.saturating_add(1),
            None if is_root() => 0,
            None => self.branches.get(self.key(parent)).copied().unwrap_or(DEPTH_UNKNOWN),
        }
    }

    fn add(
        &mut self,
        key: BlockKey,
        description: &Description,
        used_ms: u64,
        host: Option<FrameIndex>,
        disk: OnDisk,
    ) -> EntryId {
        let parent = self.node_or_new(&description.parent);
        let id = self.node_or_new(&key);
        assert!(self.at(id).is_none(), "block {key} is known already");
        let mut block = Block {
            used_ms,
            host,
            label: self.labels.take(&description.label),
            first_token: description.tokens.first().copied().unwrap_or_default(),
            depth: DEPTH_UNKNOWN,
            disk,
            is_full: description.is_full,
            hinted: false,
            reused: self.gone.contains_key(&key.short())
                || self.at(parent).is_some_and(|parent| parent.reused),
        };
        block.depth = self.depth_under(parent, &block);
        if !description.is_full {
            self.tails.insert(id, description.tokens.clone());
        }
        let older = std::mem::replace(&mut self.nodes[parent.index()].newest_child, id);
        if let Some(older) = older.some() {
            self.nodes[older.index()].newer = id;
        }
        let node = &mut self.nodes[id.index()];
        (node.parent, node.older, node.newer) = (parent, older, EntryId::NONE);
        node.block = Some(block);
        self.blocks += 1;
        self.gone.remove(&key.short());
        id
    }

    fn node_or_new(&mut self, key: &BlockKey) -> EntryId {
        if let Some(id) = self.node_of(key) {
            return id;
        }
        let none = EntryId::NONE;
        let node = Node {
            key: *key,
            parent: none,
            newest_child: none,
            older: none,
            newer: none,
            block: None,
        };
        let id = self.vacant.pop().unwrap_or(EntryId(self.nodes.len() as u32));
        assert!(id != EntryId::NONE, "no more blocks than ids");
        if id.index() == self.nodes.len() {
            self.nodes.push(node);
        } else {
            self.nodes[id.index()] = node;
        }
        let (nodes, hasher) = (&self.nodes, self.hasher);
        let hash = |id: &EntryId| hasher.hash_one(nodes[id.index()].key);
        self.ids.insert_unique(hasher.hash_one(key), id, hash);
        id
    }

    /// Frees a node that has neither a block nor children.
    fn drop_if_bare(&mut self, id: EntryId) {
        let node = &self.nodes[id.index()];
        if node.block.is_some() || node.newest_child != EntryId::NONE {
            return;
        }
        if let Ok(entry) = self.ids.find_entry(self.hasher.hash_one(node.key), |other| *other == id)
        {
            entry.remove();
            self.leaving.push(id);
        }
    }

    /// Forgets a block, and remembers why.
    pub fn remove(&mut self, key: &BlockKey, reason: MissReason) -> Option<Block> {
        let id = self.node_of(key)?;
        let node = &mut self.nodes[id.index()];
        let block = node.block.take()?;
        let (parent, older, newer) = (node.parent, node.older, node.newer);
        (node.parent, node.older, node.newer) = (EntryId::NONE, EntryId::NONE, EntryId::NONE);
        if let Some(older) = older.some() {
            self.nodes[older.index()].newer = newer;
        }
        match newer.some() {
            Some(newer) => self.nodes[newer.index()].older = older,
            None => self.nodes[parent.index()].newest_child = older,
        }
        self.drop_if_bare(id);
        self.drop_if_bare(parent);
        self.blocks -= 1;
        self.labels.give_back(block.label);
        self.tails.remove(&id);
        self.changed.push(id);
        self.remember(key, reason);
        Some(block)
    }

    fn remember(&mut self, key: &BlockKey, reason: MissReason) {
        if self.gone.insert(key.short(), (reason, self.now_ms)).is_none() {
            self.gone_order.push_back(key.short());
        }
        while self.gone_order.len() > GONE_MAX {
            if let Some(oldest) = self.gone_order.pop_front() {
                self.gone.remove(&oldest);
            }
        }
    }

    /// Tails that a full or longer block, `tokens` under `parent`, continues: it replaces them.
    pub fn outgrown(&self, parent: &BlockKey, label: &Label, tokens: &[u32]) -> Vec<BlockKey> {
        let is_outgrown = |(id, block): &(EntryId, &Block)| {
            let tail = self.tails.get(id);
            tail.is_some_and(|tail| tail.len() < tokens.len() && tokens.starts_with(tail))
                && self.label(block) == label
        };
        let children = self.node_of(parent).into_iter().flat_map(|id| self.children_of(id));
        children.filter(is_outgrown).map(|(id, _)| *self.key(id)).collect()
    }

    fn children_of(&self, parent: EntryId) -> impl Iterator<Item = (EntryId, &Block)> {
        let first = self.nodes[parent.index()].newest_child.some();
        let children = std::iter::successors(first, |id| self.nodes[id.index()].older.some());
        children.take(CHILDREN_SCANNED_MAX).filter_map(|id| Some((id, self.at(id)?)))
    }

    /// The longest known prefix of a list that its reader takes.
    pub fn lookup(&self, list: &KeyList) -> Chain {
        let mut chain = Chain::default();
        for key in &list.keys {
            let found = self.node_of(key).and_then(|id| Some((id, self.at(id)?)));
            let label = found.map(|(_, block)| self.label(block));
            match (found, label) {
                (Some(_), Some(label)) if label.root != list.start.root_of(chain.links.len()) => {
                    chain.miss = Some(MissReason::Fingerprint);
                }
                (Some(_), Some(label)) if !list.accept.takes(&label.variant, &label.numerics) => {
                    chain.miss = Some(MissReason::Variant);
                }
                (Some((id, _)), _) => {
                    chain.links.push(Link { index: chain.links.len() as u32, key: *key, id });
                    continue;
                }
                (None, _) => {
                    chain.miss = Some(self.why_gone(key, list, chain.links.len()));
                    chain.gone_ms = self.gone.get(&key.short()).map(|(_, at_ms)| *at_ms);
                }
            }
            break;
        }
        let end = chain.links.len();
        let parent = self.node_of(&list.start.parent_of(end, &list.keys));
        let children = parent.into_iter().flat_map(|id| self.children_of(id));
        let mut open: Vec<(EntryId, &Block)> = children
            .filter(|(_, block)| {
                let label = self.label(block);
                label.root == list.start.root_of(end)
                    && list.accept.takes(&label.variant, &label.numerics)
            })
            .collect();
        if chain.links.len() == list.keys.len() {
            open = self.continuing(open, &list.tail);
        } else if chain.miss == Some(MissReason::Variant) {
            open.clear();
        } else {
            // Only the runtime knows the next tokens: it compares. Blocks in frames first.
            open.sort_by_key(|(_, block)| (block.is_full, std::cmp::Reverse(block.used_ms)));
            let any_in_host = open.iter().any(|(_, block)| block.host.is_some());
            open.retain(|(_, block)| !any_in_host || block.host.is_some());
        }
        let index = chain.links.len() as u32;
        let offered = open.into_iter().take(CANDIDATES_MAX);
        chain.links.extend(offered.map(|(id, _)| Link { index, key: *self.key(id), id }));
        chain
    }

    /// Of a block's children those that go on as `tail` does: the tail that shares most tokens, then full
    /// blocks in frames that begin alike, of which the runtime compares the rest. Full ones on disk are not
    /// worth a read: less than a block can be gained.
    fn continuing<'a>(
        &self,
        children: Vec<(EntryId, &'a Block)>,
        tail: &[u32],
    ) -> Vec<(EntryId, &'a Block)> {
        let shared = |id: &EntryId| {
            let tokens = self.tails.get(id)?;
            let shared = tokens.iter().zip(tail).take_while(|(a, b)| a == b).count();
            (shared > 0).then_some(shared)
        };
        let best = children.iter().filter_map(|child| Some((shared(&child.0)?, *child)));
        let best = best.max_by_key(|(shared, _)| *shared);
        if best.is_some_and(|(shared, _)| shared == tail.len()) {
            return best.map(|(_, child)| child).into_iter().collect();
        }
        let begins_alike = |(_, block): &(EntryId, &Block)| {
            block.is_full && block.host.is_some() && tail.first() == Some(&block.first_token)
        };
        let mut full: Vec<_> = children.into_iter().filter(begins_alike).collect();
        full.sort_by_key(|(_, block)| std::cmp::Reverse(block.used_ms));
        best.map(|(_, child)| child).into_iter().chain(full).collect()
    }

    /// Open children of `parent` that go on as `tail` does, whoever reads them: what a transfer takes along.
    pub fn tails_of(&self, parent: &BlockKey, root: &RootKey, tail: &[u32]) -> Vec<BlockKey> {
        let children = self.node_of(parent).into_iter().flat_map(|id| self.children_of(id));
        let ours = children.filter(|(_, block)| self.label(block).root == *root).collect();
        let open = self.continuing(ours, tail).into_iter().take(CANDIDATES_MAX);
        open.map(|(id, _)| *self.key(id)).collect()
    }

    fn why_gone(&self, key: &BlockKey, list: &KeyList, index: usize) -> MissReason {
        // Under a root, behind what all share, and where a truncation took something out, others may hang
        // without a divergence.
        let is_branch = list.start.breaks().contains(&(index as u32));
        let parent = self.node_of(&list.start.parent_of(index, &list.keys));
        let has_siblings = !is_branch
            && parent.is_some_and(|id| self.nodes[id.index()].newest_child != EntryId::NONE);
        match self.gone.get(&key.short()) {
            Some((reason, _)) => *reason,
            None if has_siblings => MissReason::Diverged,
            None => MissReason::NeverStored,
        }
    }

    /// Panics where an invariant of the module does not hold.
    #[cfg(test)]
    pub fn self_check(&self) {
        let mut children = 0;
        for (place, node) in self.nodes.iter().enumerate() {
            let id = EntryId(place as u32);
            let is_vacant = self.vacant.contains(&id) || self.leaving.contains(&id);
            assert_eq!(self.node_of(&node.key) == Some(id), !is_vacant, "{id:?} in the table");
            if is_vacant {
                assert!(node.block.is_none() && node.newest_child == EntryId::NONE);
                continue;
            }
            let mut next = node.newest_child.some();
            assert!(node.block.is_some() || next.is_some(), "{id:?} has neither block nor child");
            let mut newer = EntryId::NONE;
            while let Some(child) = next {
                let node = &self.nodes[child.index()];
                assert_eq!((node.parent, node.newer), (id, newer), "{child:?} has other relatives");
                assert!(node.block.is_some(), "{child:?} has left");
                children += 1;
                (newer, next) = (child, node.older.some());
            }
            if let Some(block) = &node.block {
                assert!(block.host.is_some() || block.disk != OnDisk::Absent, "{id:?} is nowhere");
                assert_eq!(self.tails.contains_key(&id), !block.is_full);
            }
        }
        assert_eq!((children, self.iter().count()), (self.blocks, self.blocks));
        let labelled: u32 =
            self.labels.ids.values().map(|id| self.labels.interned[*id as usize].1).sum();
        assert_eq!(labelled as usize, self.blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_protocol::{Accept, Fingerprint, Generation};
    use proptest::prelude::*;

    const TOKENS_PER_BLOCK: u16 = 4;

    fn root() -> RootKey {
        RootKey::new(&Fingerprint([1; 32]), b"")
    }

    fn own() -> Accept {
        Accept::Own { variant: Variant::Exact, numerics: NumericsTag::of("test") }
    }

    fn list(tokens: &[u32], accept: Accept) -> KeyList {
        let keys = root().chain(tokens, TOKENS_PER_BLOCK);
        let tail = tokens[keys.len() * usize::from(TOKENS_PER_BLOCK)..].to_vec();
        KeyList { start: root().into(), accept, keys, tail }
    }

    /// Stores a conversation as the runtime does: full blocks, then a tail.
    fn store(directory: &mut Directory, tokens: &[u32], variant: Variant) {
        let mut parent = root().as_parent();
        for part in tokens.chunks(usize::from(TOKENS_PER_BLOCK)) {
            let key = BlockKey::child(&parent, part);
            let header = BlockHeader {
                key,
                parent,
                root: root(),
                variant,
                numerics: NumericsTag::of("test"),
                generation: Generation(1),
                created_ms: 1,
                tokens: part.to_vec(),
                checksums: vec![],
            };
            let is_full = part.len() == usize::from(TOKENS_PER_BLOCK);
            let block = Description::of(&header, is_full, 4096);
            if directory.get(&key).is_none() {
                directory.insert(key, &block, 1, FrameIndex(directory.len() as u32));
                for tail in directory.outgrown(&parent, &block.label, part) {
                    directory.remove(&tail, MissReason::Evicted);
                }
            }
            parent = key;
        }
    }

    #[test]
    fn a_conversation_is_found_with_its_tail() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5, 6], Variant::Exact);
        let chain = directory.lookup(&list(&[1, 2, 3, 4, 5, 6, 7], own()));
        assert_eq!(chain.links.iter().map(|link| link.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(chain.miss, None);
    }

    #[test]
    fn a_tail_is_offered_when_the_conversation_has_grown_by_whole_blocks() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5, 6], Variant::Exact);
        let grown: Vec<u32> = (1..=15).collect();
        let chain = directory.lookup(&list(&grown, own()));
        assert_eq!(chain.links.iter().map(|link| link.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(chain.miss, Some(MissReason::Diverged));
    }

    #[test]
    fn a_block_that_grew_past_its_tail_replaces_it() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5, 6], Variant::Exact);
        store(&mut directory, &[1, 2, 3, 4, 5, 6, 7], Variant::Exact);
        assert_eq!(directory.len(), 2);
        store(&mut directory, &[1, 2, 3, 4, 5, 6, 7, 8], Variant::Exact);
        assert_eq!(directory.len(), 2);
        directory.self_check();
    }

    #[test]
    fn own_readers_do_not_see_another_variant() {
        let mut directory = Directory::default();
        store(&mut directory, &[1, 2, 3, 4, 5], Variant::Mixed);
        let chain = directory.lookup(&list(&[1, 2, 3, 4, 5], own()));
        assert_eq!((chain.links.len(), chain.miss), (0, Some(MissReason::Variant)));
        assert_eq!(directory.lookup(&list(&[1, 2, 3, 4, 5], Accept::Any)).links.len(), 2);
    }

    #[test]
    fn misses_say_why() {
        let mut directory = Directory::default();
        let tokens: Vec<u32> = (0..12).collect();
        let miss = |directory: &Directory| directory.lookup(&list(&tokens, own())).miss;
        assert_eq!(miss(&directory), Some(MissReason::NeverStored));
        store(&mut directory, &tokens, Variant::Exact);
        assert_eq!(miss(&directory), None);
        let last = root().chain(&tokens, TOKENS_PER_BLOCK)[2];
        directory.remove(&last, MissReason::Expired);
        assert_eq!(miss(&directory), Some(MissReason::Expired));
    }

    #[test]
    fn blocks_loaded_in_any_order_learn_how_deep_they_are() {
        let mut committed = Directory::default();
        store(&mut committed, &(0..20).collect::<Vec<_>>(), Variant::Exact);
        let keys = root().chain(&(0..20).collect::<Vec<_>>(), TOKENS_PER_BLOCK);
        let mut loaded = Directory::default();
        for place in [3, 0, 4, 1, 2] {
            let parent = if place == 0 { root().as_parent() } else { keys[place - 1] };
            let numerics = NumericsTag::of("test");
            let label = Label { root: root(), variant: Variant::Exact, numerics, disk_bytes: 4096 };
            let tokens: Arc<[u32]> = (4 * place as u32..4 * place as u32 + 4).collect();
            loaded.load(keys[place], &Description { parent, label, tokens, is_full: true }, 1);
            loaded.self_check();
        }
        assert!(loaded.take_changed().is_empty());
        let mut from = Some(0);
        while let Some(place) = from {
            from = loaded.settle(place, 2);
        }
        assert_eq!(loaded.take_changed().len(), 5);
        for key in keys {
            let depth = |directory: &Directory| directory.get(&key).map(|block| block.depth);
            assert_eq!(depth(&loaded), depth(&committed));
        }
    }

    proptest! {
        /// Oracle: the longest common prefix with any stored conversation, in whole blocks.
        #[test]
        fn a_lookup_finds_the_longest_stored_prefix(
            stored in proptest::collection::vec(proptest::collection::vec(0u32..2, 1..14), 0..8),
            asked in proptest::collection::vec(0u32..2, 1..14),
            removed in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
        ) {
            let mut directory = Directory::default();
            for tokens in &stored {
                store(&mut directory, tokens, Variant::Exact);
                directory.self_check();
            }
            for index in removed {
                let mut keys: Vec<BlockKey> = directory.iter().map(|(key, _)| *key).collect();
                keys.sort_unstable();
                if !keys.is_empty() {
                    directory.remove(index.get(&keys), MissReason::Evicted);
                    directory.self_check();
                    directory.take_changed(); // Places are given to others from here on.
                }
            }
            let list = list(&asked, own());
            let expected = list.keys.iter().take_while(|key| directory.get(key).is_some()).count();
            let chain = directory.lookup(&list);
            let whole = chain.links.iter().filter(|link| list.keys.contains(&link.key)).count();
            prop_assert_eq!(whole, expected);
            if expected == list.keys.len() {
                for link in &chain.links[whole..] {
                    prop_assert_eq!(directory.get(&link.key).unwrap().first_token, list.tail[0]);
                }
            }
        }
    }
}
