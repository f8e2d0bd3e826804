//! Conversations through the real daemon and the real `kvctl`: lists, forks, truncations, deletions.

mod support;

use std::path::Path;
use std::process::Command;

use kv_protocol::key::BlockKey;
use kv_protocol::message::CommitOutcome;
use kv_protocol::{ConversationId, Record};
use runtime::cache_client::CacheEvent;
use serde_json::{Value, json};
use support::{Daemon, Driver, conversation, geometry, payload, region_bytes, until};

const BINARY: &str = env!("CARGO_BIN_EXE_cache-daemon");
const KVCTL: &str = env!("CARGO_BIN_EXE_kvctl");
const SLOTS: &str = "--disk-engine=slots";
const SEGMENTS: &str = "--disk-engine=segments";
const BLOBDB: &str = "--disk-engine=blobdb";
/// Deletions of these tests are erased only when a test wants them to be.
const NEVER: &str = "--deletion-deadline-seconds=86400";
const SOON: &str = "--deletion-deadline-seconds=1";

fn start(dir: &Path, frames: u64, more: &[&str]) -> Daemon {
    Daemon::start(Path::new(BINARY), dir, region_bytes(frames), more)
}

/// Whether it went well, and what was said.
fn kvctl(daemon: &Daemon, arguments: &[&str]) -> (bool, String) {
    let socket = daemon.admin_socket();
    let output = Command::new(KVCTL).arg("--socket").arg(socket).args(arguments).output().unwrap();
    let told = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(told).unwrap())
}

fn kvctl_json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let (good, told) = kvctl(daemon, &[&["--json"], arguments].concat());
    assert!(good, "kvctl {arguments:?}: {told}");
    serde_json::from_str(&told).unwrap()
}

fn ready(daemon: &Daemon) {
    until("the index is read", || {
        (daemon.status().pointer("/disk/state")? == "ready").then_some(())
    });
}

/// Waits until a conversation's blocks are on disk.
fn written(daemon: &Daemon, name: &str, blocks: u64) {
    let path = format!("/conversations/{}", name.replace(' ', "%20"));
    until("all blocks are on disk", || {
        let (_, found) = daemon.admin("GET", &path, &Value::Null);
        (found["conversation"]["disk"]["blocks"] == blocks).then_some(())
    });
}

#[test]
fn a_list_shows_who_takes_what_and_where() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &["--tail-idle-seconds=0"]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    driver.save_turn("small", &conversation(1, 16 * 2)).unwrap();
    driver.save_turn("large", &conversation(2, 16 * 5 + 3)).unwrap();
    written(&daemon, "small", 2);
    written(&daemon, "large", 6);
    let list = kvctl_json(&daemon, &["top"]);
    assert_eq!(list["total"], 2);
    let line = |place: usize, pointer: &str| list["conversations"][place].pointer(pointer).cloned();
    assert_eq!(line(0, "/name"), Some(json!("large")));
    assert_eq!(line(0, "/tokens"), Some(json!(83)));
    for tier in ["host", "disk"] {
        assert_eq!(line(0, &format!("/{tier}/blocks")), Some(json!(6)), "{list}");
        assert_eq!(line(1, &format!("/{tier}/blocks")), Some(json!(2)), "{list}");
    }
    let bytes = 6 * geometry().frame_bytes();
    assert_eq!(line(0, "/host/bytes"), Some(json!(bytes)));
    let used = kvctl_json(&daemon, &["top", "--order=used", "-n1"]);
    assert_eq!((&used["total"], &used["conversations"][0]["name"]), (&json!(2), &json!("large")));
    let (good, table) = kvctl(&daemon, &["top"]);
    assert!(good && table.contains("large") && table.contains("2 of 2 conversations"), "{table}");
    let (good, screen) = kvctl(&daemon, &["status"]);
    assert!(good && screen.contains("2 on record") && screen.contains("slots ready"), "{screen}");
}

#[test]
fn a_record_that_is_none_is_refused_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 16, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let (id, record) = driver.record("chat", &conversation(1, 40));
    driver.client.put_conversation(id, b"no record".to_vec()).unwrap();
    assert_eq!(driver.ask(id).unwrap(), None);
    let other = ConversationId([3; 32]);
    driver.client.put_conversation(other, record.encode().unwrap()).unwrap();
    assert_eq!(driver.ask(other).unwrap(), None, "a record under another's id");
    driver.save_turn("chat", &conversation(1, 40)).unwrap();
}

#[test]
fn kvctl_says_which_socket_is_missing_and_which_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("admin.sock");
    let output = Command::new(KVCTL).arg("--socket").arg(&nowhere).arg("status").output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && told.contains(nowhere.to_str().unwrap()), "{told}");
    assert!(told.contains("--admin-socket"), "{told}");
    let daemon = start(dir.path(), 16, &[]);
    let (good, told) = kvctl(&daemon, &["show", "a chat/with ümlauts"]);
    assert!(!good && told.contains("no conversation \"a chat/with ümlauts\""), "{told}");
}

#[test]
fn the_admin_socket_is_its_owners_alone_and_made_anew_by_each_worker() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 16, &[]);
    for _ in 0..2 {
        let (status, _) = daemon.admin("GET", "/status", &Value::Null);
        assert_eq!(status, 200);
        let mode = std::fs::metadata(daemon.admin_socket()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        daemon.kill_worker();
    }
    assert_eq!(daemon.admin("GET", "/nowhere", &Value::Null).0, 404);
    let large = json!({ "name": "x".repeat(100_000) });
    assert_eq!(daemon.admin("POST", "/conversations/a/fork", &large).0, 413);
}

#[test]
fn a_name_in_two_tenants_has_to_be_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut ours = Driver::attach(&daemon.socket, geometry());
    ours.save_turn("chat", &conversation(1, 20)).unwrap();
    let mut theirs = Driver::spawn(&daemon.socket, geometry(), b"them");
    theirs.wait_attached();
    theirs.save_turn("chat", &conversation(2, 50)).unwrap();
    let (good, told) = kvctl(&daemon, &["show", "chat"]);
    assert!(!good && told.contains("--root"), "{told}");
    let root = theirs.root().to_string();
    assert_eq!(
        kvctl_json(&daemon, &["show", "chat", "--root", &root])["conversation"]["tokens"],
        50
    );
}

#[test]
fn explain_names_the_first_token_that_differs_and_the_first_block_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let mut tokens = conversation(1, 16 * 4);
    driver.save_turn("chat", &tokens).unwrap();
    let longer = [tokens.as_slice(), &[7; 10]].concat();
    driver.save_turn("chat", &longer).unwrap();
    let fine = kvctl_json(&daemon, &["explain", "chat"]);
    assert_eq!((&fine["divergence"], &fine["gap"]), (&Value::Null, &Value::Null));
    assert_eq!(fine["tokens_found"], 74);
    tokens[37] = 5;
    // The record only: the blocks of the new history were never stored.
    let (id, record) = driver.record("chat", &tokens);
    driver.client.put_conversation(id, record.encode().unwrap()).unwrap();
    assert!(driver.ask(id).unwrap().is_some());
    let found = kvctl_json(&daemon, &["explain", "chat"]);
    let divergence = &found["divergence"];
    assert_eq!(
        (&divergence["reason"], &divergence["shared_tokens"]),
        (&json!("edited"), &json!(37))
    );
    assert_eq!((&divergence["before"][0], &divergence["after"][0]), (&json!(100_037), &json!(5)));
    assert_eq!((&found["gap"]["block"], &found["tokens_found"]), (&json!(2), &json!(32)));
    let (_, told) = kvctl(&daemon, &["explain", "chat"]);
    assert!(told.contains("first other token: number 37"), "{told}");
}

#[test]
fn a_fork_goes_on_by_itself_and_its_tail_is_copied_on_write() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 3 + 7);
    driver.save_turn("first", &tokens).unwrap();
    kvctl_json(&daemon, &["fork", "first", "second"]);
    let (id, _) = driver.record("second", &[]);
    let copy = Record::decode(&driver.ask(id).unwrap().unwrap()).unwrap();
    assert_eq!((copy.name.as_str(), &copy.tokens), ("second", &tokens));
    let (good, told) = kvctl(&daemon, &["fork", "first", "second"]);
    assert!(!good && told.contains("is there already"), "{told}");
    // Both go on, each with other tokens behind the same partial block.
    let grown = |last: u32| [tokens.as_slice(), &[last; 20]].concat();
    driver.save_turn("second", &grown(8)).unwrap();
    assert_eq!(driver.load(&tokens).unwrap().tokens, tokens.len(), "the first, before it goes on");
    driver.save_turn("first", &grown(9)).unwrap();
    for last in [8, 9] {
        let loaded = driver.load(&grown(last)).unwrap();
        assert_eq!((loaded.host, loaded.tokens), (5, grown(last).len()));
    }
    // Three blocks are one copy, two are each one's own.
    until("all is counted", || (daemon.status_u64("/blocks/known") == 3 + 2 + 2).then_some(()));
    // A fork stays whole without its original, also while both end in one partial block.
    kvctl_json(&daemon, &["fork", "second", "third"]);
    ready(&daemon);
    kvctl_json(&daemon, &["delete", "first"]);
    kvctl_json(&daemon, &["delete", "second"]);
    assert_eq!(driver.load(&grown(8)).unwrap().tokens, grown(8).len());
    assert_eq!(driver.load(&grown(9)).unwrap().tokens, tokens.len(), "what the fork has as well");
}

#[test]
fn a_truncated_conversation_keeps_the_blocks_behind_what_was_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 6 + 5);
    let id = driver.save_turn("chat", &tokens).unwrap();
    let changed = kvctl_json(&daemon, &["truncate", "chat", "--sinks=1", "--drop=2"]);
    while !matches!(driver.next_event().unwrap(), CacheEvent::Changed { id: of, is_deleted: false } if of == id)
    {
    }
    let line = &changed["conversation"];
    assert_eq!((&line["tokens"], &line["dropped_tokens"]), (&json!(69), &json!(32)));
    // Four full blocks are found under their old names; the tail's is computed anew.
    assert_eq!((&changed["tokens_found"], &changed["gap"]), (&json!(64), &Value::Null));
    let record = Record::decode(&driver.ask(id).unwrap().unwrap()).unwrap();
    assert_eq!(record.tokens, [&tokens[..16], &tokens[48..]].concat());
    let whole = driver.root().chain(&tokens, 16);
    assert_eq!(record.keys(), [whole[0], whole[3], whole[4], whole[5]]);
    assert_eq!(changed["divergence"]["reason"], "truncated");
    let (good, told) = kvctl(&daemon, &["truncate", "chat", "--drop=5"]);
    assert!(!good && told.contains("has 4 full blocks"), "{told}");
}

/// What must not be found on disk after a deletion.
fn markers(driver: &Driver, name: &str, tokens: &[u32], own_blocks: usize) -> Vec<Vec<u8>> {
    let mut parent = driver.root().as_parent();
    let mut markers = vec![name.as_bytes().to_vec()];
    let blocks: Vec<&[u32]> = tokens.chunks(16).collect();
    for (place, block) in blocks.iter().enumerate() {
        parent = BlockKey::child(&parent, block);
        if place + own_blocks >= blocks.len() {
            markers.push(payload(&parent, &geometry())[..64].to_vec());
            markers.push(parent.0.to_vec());
            markers.push(block.iter().flat_map(|token| token.to_le_bytes()).collect());
        }
    }
    markers
}

/// Which markers are in some file under a folder.
fn found_under(dir: &Path, markers: &[Vec<u8>]) -> Vec<bool> {
    let mut found = vec![false; markers.len()];
    let mut open = vec![dir.to_owned()];
    while let Some(path) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&path) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap_or_default(); // RocksDB may have removed it.
            for (marker, found) in markers.iter().zip(&mut found) {
                let first = marker[0];
                let is_here = |place: &usize| bytes[*place..].starts_with(marker);
                let places = bytes.iter().enumerate().filter(|(_, byte)| **byte == first);
                *found = *found || places.map(|(place, _)| place).any(|place| is_here(&place));
            }
        }
    }
    found
}

#[test]
fn a_deleted_conversation_is_unreadable_at_once_and_gone_from_every_file() {
    for engine in [SLOTS, SEGMENTS, BLOBDB] {
        a_deleted_conversation_is_unreadable_at_once_and_gone_from_every_file_on(engine);
    }
}

fn a_deleted_conversation_is_unreadable_at_once_and_gone_from_every_file_on(engine: &str) {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[engine, SOON, "--tail-idle-seconds=0"]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 5 + 7);
    let name = "a conversation to be forgotten";
    // Three turns: earlier records and tails are on disk as well, replaced and outgrown.
    for turn in [16 * 2 + 4, 16 * 4 + 1, tokens.len()] {
        driver.save_turn(name, &tokens[..turn]).unwrap();
        written(&daemon, name, turn.div_ceil(16) as u64);
    }
    // Shares two blocks.
    let other = [&tokens[..32], &conversation(2, 40)[..]].concat();
    driver.save_turn("another", &other).unwrap();
    written(&daemon, "another", 5);
    let markers = markers(&driver, name, &tokens, 4);
    until("everything is found on disk", || {
        found_under(&dir.path().join("disk"), &markers).iter().all(|found| *found).then_some(())
    });

    let deleted = kvctl_json(&daemon, &["delete", name]);
    assert_eq!((&deleted["blocks"], &deleted["blocks_shared"]), (&json!(4), &json!(2)));
    let (id, _) = driver.record(name, &[]);
    assert_eq!(driver.ask(id).unwrap(), None);
    assert_eq!(driver.load(&tokens).unwrap().tokens, 32, "what is shared");
    assert!(!kvctl(&daemon, &["show", name]).0);
    until("the deletion is erased", || {
        (daemon.status_u64("/deletions/waiting") == 0).then_some(())
    });
    let found = found_under(&dir.path().join("disk"), &markers);
    assert!(
        !found.contains(&true),
        "{engine}: left of [name, then payload, key, ids of each block]: {found:?}"
    );
    assert_eq!(driver.load(&other).unwrap().tokens, other.len());
    // Not by a stop either, which writes what is left to write.
    drop(driver);
    assert_eq!(daemon.stop(), Some(0));
    let found = found_under(&dir.path().join("disk"), &markers);
    assert!(!found.contains(&true), "{engine}, after the end: {found:?}");
}

#[test]
fn a_worker_that_dies_after_the_answer_brings_nothing_back_and_the_next_ones_erase() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = conversation(1, 16 * 5 + 7);
    let name = "a conversation to be forgotten";
    let (all, id);
    {
        let daemon = start(dir.path(), 64, &[NEVER, "--tail-idle-seconds=0"]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        id = driver.save_turn(name, &tokens).unwrap();
        written(&daemon, name, 6);
        all = markers(&driver, name, &tokens, 6);
        // Pinned by somebody while it is deleted: it stays that one's until it lets go.
        let sequence = driver.enqueue(&tokens, 0);
        let (blocks, _) = driver.pin(sequence).unwrap();
        kvctl_json(&daemon, &["delete", name]);
        assert_eq!(driver.check(&tokens, &blocks, None).tokens, tokens.len());
        drop(blocks);
        driver.client.end(sequence);
        for kill in 0..3 {
            daemon.kill_worker();
            while driver.next_event().is_ok() {}
            driver.wait_attached();
            assert_eq!(driver.ask(id).unwrap(), None, "after kill {kill}");
            ready(&daemon);
            assert_eq!(driver.load(&tokens).unwrap().tokens, 0, "after kill {kill}");
            assert_eq!(daemon.status_u64("/deletions/waiting"), 1);
        }
        assert!(found_under(&dir.path().join("disk"), &all)[1], "not erased yet");
    }
    let daemon = start(dir.path(), 64, &[SOON]);
    ready(&daemon);
    until("the deletion is erased", || {
        (daemon.status_u64("/deletions/waiting") == 0).then_some(())
    });
    let found = found_under(&dir.path().join("disk"), &all);
    assert!(!found.contains(&true), "left: {found:?}");
}

#[test]
fn a_turn_that_was_running_does_not_bring_a_deleted_conversation_back() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[NEVER]);
    ready(&daemon);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let tokens = conversation(1, 16 * 4);
    driver.save_turn("chat", &tokens[..48]).unwrap();
    kvctl_json(&daemon, &["delete", "chat"]);
    assert_eq!(driver.save(&tokens).unwrap(), [CommitOutcome::Refused; 4]);
    let (id, record) = driver.record("chat", &tokens);
    driver.client.put_conversation(id, record.encode().unwrap()).unwrap();
    assert_eq!(driver.ask(id).unwrap(), None);
    assert_eq!(driver.load(&tokens).unwrap().tokens, 0);
    // Others are not concerned.
    assert_eq!(driver.save(&conversation(2, 16)).unwrap(), [CommitOutcome::Stored]);
}

#[test]
fn a_deletion_covers_histories_before_an_edit_and_turns_that_were_broken_off() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &[NEVER]);
    ready(&daemon);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    let first = conversation(1, 16 * 4 + 5);
    driver.save_turn("chat", &first).unwrap();
    let edited = [&first[..20], &[7; 50]].concat();
    driver.save_turn("chat", &edited).unwrap();
    // Broken off: blocks behind the end, and no record.
    let longer = [edited.as_slice(), &[8; 40]].concat();
    driver.save(&longer).unwrap();
    // Another conversation of the same start, and one without a name.
    let other = [&first[..16], &[9; 30]].concat();
    driver.save_turn("other", &other).unwrap();
    let nameless = [&first[..16], &[6; 16]].concat();
    driver.save(&nameless).unwrap();
    let deleted = kvctl_json(&daemon, &["delete", "chat"]);
    assert_eq!(deleted["blocks_shared"], 1);
    for gone in [&first, &edited, &longer] {
        assert_eq!(driver.load(gone).unwrap().tokens, 16);
    }
    for (left, blocks) in [(&other, 3), (&nameless, 2)] {
        assert_eq!(driver.load(left).unwrap().host, blocks);
    }
    assert_eq!(daemon.status_u64("/blocks/known"), 1 + 2 + 1);
}

#[test]
fn verify_finds_a_spoilt_block_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = conversation(1, 16 * 12);
    let spoilt = {
        let daemon = start(dir.path(), 64, &[]);
        let mut driver = Driver::attach(&daemon.socket, geometry());
        driver.save_turn("chat", &tokens).unwrap();
        let key = driver.root().chain(&tokens, 16)[7];
        drop(driver);
        assert_eq!(daemon.stop(), Some(0));
        payload(&key, &geometry())
    };
    let files = std::fs::read_dir(dir.path().join("disk/slots")).unwrap().flatten();
    let mut spoilt_files = 0;
    for path in files.map(|entry| entry.path()).filter(|path| path.is_file()) {
        let mut bytes = std::fs::read(&path).unwrap();
        let places = bytes.windows(64).position(|window| window == &spoilt[..64]);
        if let Some(place) = places {
            bytes[place + 1000] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            spoilt_files += 1;
        }
    }
    assert_eq!(spoilt_files, 1);
    let daemon = start(dir.path(), 64, &[]);
    let (good, told) = kvctl(&daemon, &["verify"]);
    assert!(!good && told.contains("no runtime has attached"), "{told}");
    let mut driver = Driver::attach(&daemon.socket, geometry());
    ready(&daemon);
    assert!(!kvctl(&daemon, &["verify"]).0, "it says that a block is bad");
    let (_, state) = daemon.admin("GET", "/verify", &Value::Null);
    assert_eq!((&state["state"], &state["bad"]), (&json!("done"), &json!(1)), "{state}");
    assert_eq!((&state["blocks"], &state["named"][0]["reason"]), (&json!(12), &json!("checksum")));
    assert!(kvctl(&daemon, &["verify"]).0, "what was bad is gone");
    assert_eq!(driver.load(&tokens).unwrap().tokens, 16 * 7);
    let (good, told) = kvctl(&daemon, &["compact"]);
    assert!(good, "{told}");
}
