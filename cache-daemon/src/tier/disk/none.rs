//! No disk: nothing is stored, nothing is found.

use kv_protocol::{BlockHeader, BlockKey, ConversationId, Geometry, Span};

use super::{
    DiskError, DiskTier, DiskUsage, NewBlock, StoredBlock, StoredConversation, WriteFailure,
};

/// See the module.
#[derive(Debug, Default)]
pub struct NoDisk;

impl DiskTier for NoDisk {
    fn load(
        &mut self,
        _block: &mut dyn FnMut(StoredBlock),
        _conversation: &mut dyn FnMut(StoredConversation),
    ) -> Result<u64, DiskError> {
        Ok(0)
    }

    fn write(
        &self,
        blocks: &[NewBlock<'_>],
        tell: &mut dyn FnMut(usize, Result<(), WriteFailure>),
    ) {
        (0..blocks.len()).for_each(|at| tell(at, Err(WriteFailure::Disk(DiskError::Absent))));
    }

    fn read(
        &self,
        _key: &BlockKey,
        _geometry: &Geometry,
        _payload: &Span,
    ) -> Result<Option<BlockHeader>, DiskError> {
        Ok(None)
    }

    fn erase(
        &self,
        _blocks: &[BlockKey],
        _conversations: &[ConversationId],
    ) -> Result<(), DiskError> {
        Ok(())
    }

    fn remove(&self, _keys: &[BlockKey]) -> Result<(), DiskError> {
        Ok(())
    }

    fn put_conversation(
        &self,
        _id: &ConversationId,
        _updated_ms: u64,
        _record: &[u8],
    ) -> Result<(), DiskError> {
        Err(DiskError::Absent)
    }

    fn get_conversation(&self, _id: &ConversationId) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(None)
    }

    fn remove_conversation(&self, _id: &ConversationId) -> Result<(), DiskError> {
        Ok(())
    }

    fn usage(&self) -> DiskUsage {
        DiskUsage::default()
    }

    fn resize(&self, _disk_bytes: u64) {}

    fn reclaim(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn probe(&self) -> Result<(), DiskError> {
        Err(DiskError::Absent)
    }
}
