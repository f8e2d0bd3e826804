//! Copies of blocks for transfers: out of a frame or the store into private memory, and from there into a
//! frame. Every row is checked on each way.

use kv_protocol::message::FrameHandle;
use kv_protocol::table::FrameTable;
use kv_protocol::{BlockHeader, BlockKey, Generation, Geometry, MissReason, RootKey, Span};

use super::{DiskTier, read_checked};
use crate::migrate::bundle::BlockBytes;

/// Where a block is copied from.
#[derive(Debug)]
pub enum CopyFrom {
    /// A frame that the loop holds.
    Frame {
        /// Which.
        handle: FrameHandle,
        /// The region.
        table: FrameTable,
    },
    /// The store; blocks of another shape are not copied.
    Disk(Geometry),
}

/// Copies a block out.
pub(super) fn copy(
    tier: &dyn DiskTier,
    key: &BlockKey,
    root: &RootKey,
    from: &CopyFrom,
) -> Result<BlockBytes, MissReason> {
    match from {
        CopyFrom::Frame { handle, table } => copy_frame(key, root, *handle, table),
        CopyFrom::Disk(geometry) => {
            let payload = Span::heap(geometry.payload_bytes());
            let header = read_checked(tier, key, root, geometry, &payload)?;
            Ok(BlockBytes::new(joined(&header, geometry, &payload)))
        }
    }
}

fn copy_frame(
    key: &BlockKey,
    root: &RootKey,
    handle: FrameHandle,
    table: &FrameTable,
) -> Result<BlockBytes, MissReason> {
    let geometry = table.geometry();
    let mut header = table.header(handle).map_err(|_| MissReason::Checksum)?;
    if header.key != *key || header.root != *root {
        return Err(MissReason::Fingerprint);
    }
    header.generation = Generation(0);
    let bytes = joined(&header, geometry, &table.payload(handle.frame));
    // The copy is checked, not the frame: its peer may write at any time.
    let is_right = are_rows_right(&header, geometry, &bytes[BlockHeader::bytes(geometry)..]);
    if is_right { Ok(BlockBytes::new(bytes)) } else { Err(MissReason::Checksum) }
}

/// Header, of this layout version whatever was stored, and payload.
fn joined(header: &BlockHeader, geometry: &Geometry, payload: &Span) -> Vec<u8> {
    let mut bytes = header.encode(geometry);
    let header_bytes = bytes.len();
    bytes.resize(BlockBytes::len_of(geometry), 0);
    payload.copy_out(0, &mut bytes[header_bytes..]);
    bytes
}

fn are_rows_right(header: &BlockHeader, geometry: &Geometry, payload: &[u8]) -> bool {
    let rows = payload.chunks_exact(geometry.row_bytes() as usize);
    rows.len() == header.checksums.len()
        && rows.zip(&header.checksums).all(|(row, crc)| crc32c::crc32c(row) == *crc)
}

/// Copies a block into a granted frame, its header last: until then the frame is nobody's to read.
pub(super) fn fill(
    block: &BlockBytes,
    handle: FrameHandle,
    table: &FrameTable,
) -> Result<BlockHeader, MissReason> {
    let geometry = table.geometry();
    let (mut header, payload) = block.split(geometry).map_err(|_| MissReason::Checksum)?;
    if !are_rows_right(&header, geometry, payload) {
        return Err(MissReason::Checksum);
    }
    table.payload(handle.frame).copy_in(0, payload);
    header.generation = handle.generation;
    table.write_header(handle.frame, &header);
    Ok(header)
}
