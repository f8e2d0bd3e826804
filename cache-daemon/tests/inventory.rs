//! The inventory feed of a real daemon, read by a client as `docs/inventory.md` says.

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use kv_protocol::{ConversationId, Record};
use serde_json::Value;
use support::{Daemon, Driver, conversation, geometry, region_bytes, until};

const BINARY: &str = env!("CARGO_BIN_EXE_cache-daemon");

/// `tokens`, `host_bytes`, `disk_bytes`, `used_ms`.
type Told = [u64; 4];

/// What a client knows by the lines that it got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Map {
    epoch: String,
    sequence: u64,
    is_whole: bool,
    conversations: BTreeMap<String, Told>,
    totals: [u64; 3],
    /// Its stream has ended; for this reason, empty if the daemon gave none.
    end: Option<String>,
}

impl Map {
    fn read(&mut self, line: &Value) {
        let numbers = |fields: &[&str]| -> Vec<u64> {
            fields.iter().map(|field| line[field].as_u64().expect("a number")).collect()
        };
        let id = || line["id"].as_str().expect("an id").to_owned();
        let kind = line["type"].as_str().expect("a type");
        if let (Some(sequence), true) = (line["sequence"].as_u64(), kind != "snapshot") {
            let is_change = !matches!(kind, "heartbeat" | "end");
            assert_eq!(sequence, self.sequence + u64::from(is_change), "a gap before {line}");
            self.sequence = sequence;
        }
        match kind {
            "snapshot" => {
                line["epoch"].as_str().expect("an epoch").clone_into(&mut self.epoch);
                self.sequence = line["sequence"].as_u64().expect("a number");
            }
            "snapshot_end" => self.is_whole = true,
            "conversation" => {
                let told = numbers(&["tokens", "host_bytes", "disk_bytes", "used_ms"]);
                self.conversations.insert(id(), told.try_into().expect("four"));
            }
            "gone" => drop(self.conversations.remove(&id())),
            "totals" => {
                let totals = numbers(&["conversations", "host_bytes", "disk_bytes"]);
                self.totals = totals.try_into().expect("three");
            }
            "heartbeat" => {}
            "end" => self.end = Some(line["reason"].as_str().expect("a reason").to_owned()),
            other => panic!("a line of type {other}"),
        }
    }

    /// Bytes of all conversations, by tier.
    fn sums(&self) -> [u64; 2] {
        let sum = |at: usize| self.conversations.values().map(|told| told[at]).sum();
        [sum(1), sum(2)]
    }
}

/// The feed's lines; `None` while all places are taken, as by streams that were closed just now.
fn feed(daemon: &Daemon) -> Option<impl Iterator<Item = Value> + use<>> {
    let mut stream = TcpStream::connect(daemon.http).expect("the daemon listens");
    write!(stream, "GET /inventory HTTP/1.0\r\n\r\n").expect("it reads");
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let is_there = lines.next()?.contains(" 200 ");
    let lines = lines.skip_while(|line| !line.is_empty()).skip(1);
    is_there.then(|| lines.map(|line| serde_json::from_str(&line).expect(&line)))
}

/// A client that reads all the time, on a thread of its own, until its stream ends.
fn follow(daemon: &Daemon) -> Arc<Mutex<Map>> {
    let lines = until("there is a place", || feed(daemon));
    let map = Arc::new(Mutex::new(Map::default()));
    std::thread::spawn({
        let map = map.clone();
        move || {
            lines.for_each(|line| map.lock().unwrap().read(&line));
            map.lock().unwrap().end.get_or_insert_default();
        }
    });
    map
}

/// What a client that comes now is told.
fn snapshot(daemon: &Daemon) -> Map {
    until("the snapshot is whole", || {
        let mut map = Map::default();
        for line in feed(daemon)? {
            map.read(&line);
            if map.is_whole {
                return Some(map);
            }
        }
        None
    })
}

/// One turn: its blocks, then its record.
fn turn(driver: &mut Driver, number: u32, tokens: u32) -> ConversationId {
    let tokens = conversation(number, tokens);
    driver.save(&tokens).unwrap();
    let name = format!("conversation {number}");
    let id = ConversationId::new(&driver.root(), name.as_bytes());
    let record = Record::new(driver.root(), name, geometry().tokens_per_block(), tokens);
    driver.client.put_conversation(id, record.encode().unwrap()).unwrap();
    id
}

/// Waits until both clients know the same, and that is all there is: no block belongs to two conversations
/// here, and each to one.
fn agree(daemon: &Daemon, followed: &Mutex<Map>) -> Map {
    until("the feed says what is there", || {
        let fresh = snapshot(daemon);
        let map = followed.lock().unwrap().clone();
        let is_same = map.conversations == fresh.conversations && map.totals == fresh.totals;
        let frames = daemon.status_u64("/frames/ready") + daemon.status_u64("/frames/pinned");
        let is_right = map.sums() == [frames * 8192, daemon.status_u64("/disk/stored_bytes")];
        (is_same && is_right && map.totals[1..] == map.sums()).then_some(map)
    })
}

#[test]
fn a_client_that_applies_the_stream_knows_what_a_new_snapshot_says() {
    let dir = tempfile::tempdir().unwrap();
    // A tail goes to disk at once: nothing moves any more when the turns are over.
    let daemon =
        Daemon::start(Path::new(BINARY), dir.path(), region_bytes(48), &["--tail-idle-seconds=0"]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    turn(&mut driver, 0, 16 * 3 + 5);
    let followed = follow(&daemon);
    let mut lengths = [16_u32; 12];
    let mut random = 7_u32;
    for round in 1..=90_u32 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let number = (random >> 16) % lengths.len() as u32;
        let length = &mut lengths[number as usize];
        *length += (random >> 8) % 30;
        turn(&mut driver, number + 1, *length);
        if random >> 28 < 4 {
            driver.load(&conversation(number + 1, *length)).unwrap(); // Some comes back from disk.
        }
        if round % 30 == 0 {
            agree(&daemon, &followed);
        }
    }
    let map = agree(&daemon, &followed);
    assert_eq!(map.end, None);
    assert!(daemon.status_u64("/evictions_host") > 0, "nothing moved: {}", daemon.status());
    // All but the first came as changes; turns that follow one another at once may share one.
    assert!(map.sequence >= map.conversations.len() as u64 - 1, "{map:?}");
}

#[test]
fn another_worker_is_another_epoch_and_a_stop_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Path::new(BINARY), dir.path(), region_bytes(48), &[]);
    let mut driver = Driver::attach(&daemon.socket, geometry());
    turn(&mut driver, 1, 100);
    let followed = follow(&daemon);
    let ended = |followed: &Mutex<Map>| {
        until("the stream has ended", || {
            let map = followed.lock().unwrap();
            map.end.is_some().then(|| map.clone())
        })
    };
    until("the snapshot is whole", || followed.lock().unwrap().is_whole.then_some(()));
    daemon.kill_worker();
    let before = ended(&followed);
    assert_eq!(before.end.as_deref(), Some(""), "a killed worker says nothing");
    until("the worker is back", || (daemon.status_u64("/worker_starts") == 2).then_some(()));
    while driver.next_event().is_ok() {}
    driver.wait_attached();
    let id = turn(&mut driver, 2, 100);
    let followed = follow(&daemon);
    let map = until("the record is told", || {
        let map = followed.lock().unwrap();
        let is_told = map.conversations.keys().any(|told| told.starts_with(&id.to_string()));
        (map.is_whole && is_told).then(|| map.clone())
    });
    assert_ne!(map.epoch, before.epoch);
    assert_eq!(daemon.stop(), Some(0));
    assert_eq!(ended(&followed).end.as_deref(), Some("stopping"));
}

#[test]
fn one_subscriber_too_many_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(Path::new(BINARY), dir.path(), region_bytes(48), &[]);
    let all: Vec<_> = (0..16).map(|_| follow(&daemon)).collect();
    for followed in &all {
        until("the snapshot is whole", || followed.lock().unwrap().is_whole.then_some(()));
    }
    let mut stream = TcpStream::connect(daemon.http).unwrap();
    write!(stream, "GET /inventory HTTP/1.0\r\n\r\n").unwrap();
    let answer = BufReader::new(stream).lines().map_while(Result::ok).collect::<Vec<_>>();
    assert!(answer[0].contains("503"), "{answer:?}");
    assert!(answer.last().unwrap().contains("16 subscribers"), "{answer:?}");
}
