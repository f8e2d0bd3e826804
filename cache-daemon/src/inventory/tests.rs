use super::*;
use proptest::prelude::*;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::mpsc::channel;

/// What a client knows, by the lines that it got.
#[derive(Debug, Default)]
struct Client {
    epoch: String,
    sequence: u64,
    is_whole: bool,
    conversations: HashMap<String, (u64, u64, u64)>,
    totals: Value,
    end: Option<String>,
}

impl Client {
    fn read(&mut self, line: &[u8]) {
        let line: Value = serde_json::from_slice(line).expect("a line of JSON");
        let number = |field: &str| line[field].as_u64().expect("a number");
        if let (Some(sequence), true) = (line["sequence"].as_u64(), line["type"] != "snapshot") {
            match line["type"].as_str() {
                Some("end") => assert!(sequence >= self.sequence, "{line} goes back"), // What was missed is missing.
                Some("heartbeat") => assert_eq!(sequence, self.sequence, "a gap before {line}"),
                _ => assert_eq!(sequence, self.sequence + 1, "a gap before {line}"),
            }
            self.sequence = sequence;
        }
        let id = || line["id"].as_str().expect("an id").to_owned();
        match line["type"].as_str().expect("a type") {
            "snapshot" => {
                line["epoch"].as_str().expect("an epoch").clone_into(&mut self.epoch);
                self.sequence = number("sequence");
            }
            "snapshot_end" => self.is_whole = true,
            "conversation" => {
                let bytes = (number("host_bytes"), number("disk_bytes"), number("used_ms"));
                self.conversations.insert(id(), bytes);
            }
            "gone" => drop(self.conversations.remove(&id())),
            "totals" => self.totals = line,
            "heartbeat" => {}
            "end" => self.end = line["reason"].as_str().map(str::to_owned),
            other => panic!("a line of type {other}"),
        }
    }

    /// Everything that waits for it.
    fn read_all(&mut self, stream: &mut Subscription) {
        while let Ok(line) = stream.lines.try_recv() {
            self.read(&line);
        }
        while let Ok(line) = stream.end.try_recv() {
            self.read(&line);
        }
    }
}

#[derive(Debug, Default)]
struct Shelf(BTreeMap<ConversationId, Entry>);

impl Stock for Shelf {
    fn before(&self, age: Option<Age>, count: usize) -> Vec<Age> {
        let mut ages: Vec<Age> = self.0.iter().map(|(id, entry)| (entry.used_ms, *id)).collect();
        ages.sort_unstable_by(|a, b| b.cmp(a));
        ages.into_iter().filter(|one| age.is_none_or(|age| *one < age)).take(count).collect()
    }

    fn entry(&self, id: &ConversationId) -> Option<Entry> {
        self.0.get(id).copied()
    }

    fn totals(&self) -> Totals {
        Totals {
            conversations: self.0.len() as u64,
            host_bytes: self.0.values().map(|entry| entry.host_bytes).sum(),
            disk_bytes: self.0.values().map(|entry| entry.disk_bytes).sum(),
        }
    }
}

impl Shelf {
    fn seen(&self) -> HashMap<String, (u64, u64, u64)> {
        let entries = self.0.iter();
        entries.map(|(id, e)| (hex(&id.0), (e.host_bytes, e.disk_bytes, e.used_ms))).collect()
    }
}

fn id(number: u32) -> ConversationId {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    ConversationId(bytes)
}

fn entry(host_bytes: u64, used_ms: u64, blocks: usize) -> Entry {
    let root = RootKey([1; 32]);
    Entry { root, tokens: 16, host_bytes, disk_bytes: 2 * host_bytes, used_ms, blocks }
}

/// Steps and reads until nothing more comes.
fn settle(
    inventory: &mut Inventory,
    shelf: &Shelf,
    now: &mut Instant,
    streams: &mut [(Client, Subscription)],
) {
    for _step in 0..20 + shelf.0.len() {
        *now += STEP_EVERY;
        while inventory.step(shelf, *now) {}
        for (client, stream) in streams.iter_mut() {
            client.read_all(stream);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Oracle: the shelf itself. Clients come at any time and read now and then.
    #[test]
    fn snapshot_and_changes_make_the_stock_whatever_happens(
        happenings in proptest::collection::vec(
            (0..5u8, 0..40u32, 0..50u64, 1..3000usize),
            1..120,
        ),
    ) {
        let (give, new) = channel();
        let mut inventory = Inventory::new(new);
        let (mut shelf, mut now) = (Shelf::default(), Instant::now());
        let mut streams: Vec<(Client, Subscription)> = Vec::new();
        for (clock, (kind, number, bytes, blocks)) in (1..).zip(happenings) {
            match kind {
                0 => drop(shelf.0.remove(&id(number))),
                // A turn ends; a block moves; or an old record is found on disk.
                1 => drop(shelf.0.insert(id(number), entry(bytes, clock / 2, blocks))),
                2 => {
                    if let Some(entry) = shelf.0.get_mut(&id(number)) {
                        entry.host_bytes = bytes;
                    }
                }
                3 => drop(shelf.0.entry(id(number)).or_insert(entry(bytes, number.into(), blocks))),
                _ if streams.len() < SUBSCRIBERS_MAX => {
                    let (subscriber, stream) = subscribe();
                    give.send(subscriber).unwrap();
                    streams.push((Client::default(), stream));
                }
                _ => {
                    let (client, stream) = &mut streams[number as usize % SUBSCRIBERS_MAX];
                    client.read_all(stream);
                }
            }
            now += STEP_EVERY;
            inventory.step(&shelf, now);
        }
        settle(&mut inventory, &shelf, &mut now, &mut streams);
        let totals = serde_json::to_value(shelf.totals()).unwrap();
        for (client, _) in &streams {
            prop_assert!(client.is_whole);
            prop_assert_eq!(&client.conversations, &shelf.seen());
            prop_assert_eq!(client.sequence, inventory.sequence);
            for field in ["conversations", "host_bytes", "disk_bytes"] {
                prop_assert_eq!(&client.totals[field], &totals[field]);
            }
        }
    }
}

/// Subscribes, and gets the whole snapshot.
fn listen(
    inventory: &mut Inventory,
    give: &std::sync::mpsc::Sender<Subscriber>,
    shelf: &Shelf,
    now: &mut Instant,
) -> (Client, Subscription) {
    let (subscriber, stream) = subscribe();
    give.send(subscriber).unwrap();
    let mut streams = [(Client::default(), stream)];
    settle(inventory, shelf, now, &mut streams);
    let [both] = streams;
    assert!(both.0.is_whole);
    both
}

#[test]
fn a_step_looks_at_a_bounded_number_of_blocks() {
    #[derive(Default)]
    struct Counted(Shelf, std::cell::Cell<usize>);
    impl Stock for Counted {
        fn before(&self, age: Option<Age>, count: usize) -> Vec<Age> {
            self.0.before(age, count)
        }
        fn entry(&self, id: &ConversationId) -> Option<Entry> {
            let entry = self.0.entry(id)?;
            self.1.set(self.1.get() + entry.blocks);
            Some(entry)
        }
        fn totals(&self) -> Totals {
            self.0.totals()
        }
    }
    let mut stock = Counted::default();
    stock.0.0.extend((0..2000).map(|number| (id(number), entry(1, number.into(), 100))));
    let (give, new) = channel();
    let mut inventory = Inventory::new(new);
    let (subscriber, mut stream) = subscribe();
    give.send(subscriber).unwrap();
    let mut client = Client::default();
    let mut now = Instant::now();
    while !client.is_whole {
        now += STEP_EVERY;
        stock.1.set(0);
        inventory.step(&stock, now);
        assert!(stock.1.get() <= STEP_BLOCKS + 100, "{} blocks in one step", stock.1.get());
        client.read_all(&mut stream);
    }
    assert_eq!(client.conversations.len(), 2000);
}

#[test]
fn who_does_not_read_is_told_so_and_others_hear_on() {
    let mut shelf = Shelf::default();
    shelf.0.insert(id(1), entry(1, 1, 1));
    let (give, new) = channel();
    let mut inventory = Inventory::new(new);
    let mut now = Instant::now();
    let (mut reader, mut reads) = listen(&mut inventory, &give, &shelf, &mut now);
    let (mut sleeper, mut sleeps) = listen(&mut inventory, &give, &shelf, &mut now);
    for change in 0..2 * BACKLOG_LINES_MAX as u64 {
        shelf.0.insert(id(1), entry(change, change, 1));
        now += STEP_EVERY;
        inventory.step(&shelf, now);
        reader.read_all(&mut reads);
    }
    assert_eq!((&reader.conversations, reader.end.as_deref()), (&shelf.seen(), None));
    sleeper.read_all(&mut sleeps);
    assert_eq!(sleeper.end.as_deref(), Some("too_slow"));
    let (fresh, _) = listen(&mut inventory, &give, &shelf, &mut now);
    assert_eq!((&fresh.epoch, &fresh.conversations), (&reader.epoch, &shelf.seen()));
}

#[test]
fn nobody_listening_costs_nothing_and_a_stop_says_so() {
    let mut shelf = Shelf::default();
    shelf.0.insert(id(1), entry(1, 1, 1));
    let (give, new) = channel();
    let mut inventory = Inventory::new(new);
    let mut now = Instant::now();
    let (client, stream) = listen(&mut inventory, &give, &shelf, &mut now);
    assert_eq!(inventory.rest_max(Duration::from_secs(1)), STEP_EVERY);
    drop((client, stream));
    inventory.step(&shelf, now);
    assert!(inventory.told.is_empty());
    assert_eq!(inventory.rest_max(Duration::from_secs(1)), Duration::from_secs(1));
    let (mut client, mut stream) = listen(&mut inventory, &give, &shelf, &mut now);
    inventory.stop();
    client.read_all(&mut stream);
    assert_eq!(client.end.as_deref(), Some("stopping"));
}
