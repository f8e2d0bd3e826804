//! Between two daemons.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use kv_protocol::geometry::LayerSet;
use kv_protocol::{ConversationId, Dtype, Geometry, Record};
use serde_json::json;

use crate::proxy::{Plan, Proxy};
use crate::replica::{BINARY, Replica, SECRET, ask, number};
use crate::support::{conversation, free_address, geometry};

#[test]
fn a_conversation_moves_byte_for_byte_from_frames_and_from_disk() {
    // Frames for half of it: the rest is on disk at both ends.
    let mut source = Replica::start(40, &[]);
    let here = Replica::start(40, &[]);
    let held = source.hold(1, 16 * 70 + 5);
    let report = here.import(held.id, source.exports).expect("an import");
    assert_eq!(number(&report, "blocks"), held.blocks as u64, "{report}");
    assert_eq!(number(&report, "arrived"), held.blocks as u64, "{report}");
    assert_eq!(report["record_kept"], true);
    // Nothing was promoted at the source, and nothing is sent twice.
    assert_eq!(source.daemon.status_u64("/promotes_by_lookup"), 0);
    let again = here.import(held.id, source.exports).expect("an import");
    assert_eq!((number(&again, "missing"), number(&again, "arrived")), (0, 0), "{again}");
    // All at once they need more frames than either daemon had.
    for replica in [source, here] {
        let mut replica = replica.reopened(100);
        assert_eq!(replica.check(&held), held.tokens.len());
        assert!(ask(&mut replica.driver, held.id).is_some());
    }
}

#[test]
fn what_every_tenant_shares_moves_with_a_conversation() {
    let mut source = Replica::start(40, &[]);
    let mut here = Replica::start(40, &[]);
    for replica in [&mut source, &mut here] {
        replica.driver.share(4);
    }
    let held = source.hold(1, 16 * 10 + 5);
    let report = here.import(held.id, source.exports).expect("an import");
    assert_eq!(number(&report, "arrived"), held.blocks as u64, "{report}");
    assert_eq!(here.check(&held), held.tokens.len());
}

#[test]
fn a_wrong_secret_is_refused_with_a_sentence_and_a_right_one_is_read_anew() {
    let mut source = Replica::start(40, &[]);
    let held = source.hold(1, 16 * 4);
    let mut here = Replica::with(40, geometry(), "another secret, just as long as the first", &[]);
    let refused = here.import(held.id, source.exports).expect_err("a wrong secret");
    assert!(refused.contains("401") && refused.contains("another secret"), "{refused}");
    assert_eq!(here.check(&held), 0);
    std::fs::write(here.dir.path().join("secret"), format!("{SECRET}\n")).expect("our own folder");
    here.import(held.id, source.exports).expect("the right secret");
    assert_eq!(here.check(&held), held.tokens.len());
}

#[test]
fn a_listener_without_a_secret_is_a_bad_configuration() {
    let dir = tempfile::tempdir().expect("a folder");
    let start = |flags: &[&str]| {
        let output = Command::new(BINARY)
            .args(["supervise", "--host-bytes=16MiB", "--migration-listen=127.0.0.1:0"])
            .arg(format!("--socket={}", dir.path().join("daemon.sock").display()))
            .args(flags)
            .stdin(Stdio::null())
            .output()
            .expect("it starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, words) = start(&[]);
    assert_eq!(code, Some(64), "{words}");
    assert!(words.contains("--migration-secret-file"), "{words}");
    let short = dir.path().join("short");
    std::fs::write(&short, "too short").expect("our own folder");
    let (code, words) = start(&[&format!("--migration-secret-file={}", short.display())]);
    assert_eq!(code, Some(64), "{words}");
    assert!(words.contains("9 bytes"), "{words}");
}

#[test]
fn a_truncated_conversation_moves_with_what_it_kept_and_what_came_after() {
    let mut source = Replica::start(60, &[]);
    let mut here = Replica::start(60, &[]);
    source.driver.share(3);
    let held = source.hold(1, 16 * 20 + 5);
    let (status, told) = source.daemon.admin(
        "POST",
        "/conversations/conversation%201/truncate",
        &json!({ "sinks": 4, "drop": 7 }),
    );
    assert_eq!(status, 200, "{told}");
    let record = ask(&mut source.driver, held.id).expect("a record");
    let record = Record::decode(&record).expect("a record");
    source.driver.start = record.start();
    let grown = [record.tokens.as_slice(), &conversation(9, 16 * 3)].concat();
    source.driver.save_turn("conversation 1", &grown).expect("attached");
    let report = here.import(held.id, source.exports).expect("an import");
    let blocks = grown.len().div_ceil(16) as u64;
    assert_eq!(
        (number(&report, "blocks"), number(&report, "arrived")),
        (blocks, blocks),
        "{report}"
    );
    here.driver.start = record.start();
    assert_eq!(here.driver.load(&grown).expect("attached").tokens, grown.len());
    let record = Record::decode(&ask(&mut here.driver, held.id).expect("a record"));
    assert_eq!(record.map(|record| record.start()), Ok(here.driver.start.clone()));
}

#[test]
fn an_unknown_conversation_and_another_model_are_refused_by_name() {
    let mut source = Replica::start(40, &[]);
    let here = Replica::start(40, &[]);
    let unknown = here.import(ConversationId([5; 32]), source.exports).expect_err("unknown");
    assert!(unknown.contains("404") && unknown.contains("not known"), "{unknown}");
    let held = source.hold(1, 40);
    let wider = Geometry::new(16, 6, 1, 32, Dtype::F16, LayerSet::all(6)).expect("a geometry");
    let other = Replica::with(40, wider, SECRET, &[]);
    let refused = other.import(held.id, source.exports).expect_err("another model");
    assert!(refused.contains("model"), "{refused}");
}

#[test]
fn a_transfer_that_breaks_goes_on_where_it_was() {
    let mut source = Replica::start(100, &[]);
    let mut here = Replica::start(100, &[]);
    let held = source.hold(1, 16 * 80);
    // Every connection breaks after some ten blocks.
    let proxy = Proxy::start(source.exports, |_, _| Plan::CutAfter(90_000));
    let report = here.import(held.id, proxy.address).expect("an import");
    assert_eq!(number(&report, "arrived"), held.blocks as u64, "{report}");
    assert!(number(&report, "retries") >= 5, "{report}");
    assert_eq!(here.check(&held), held.tokens.len());
    // What had arrived was not sent again, but for a block or two that were on their way at each break.
    let payload = held.blocks as u64 * geometry().payload_bytes();
    let sent: u64 = proxy.carried().iter().map(|carried| carried.sent).sum();
    assert!(sent < 2 * payload, "{sent} bytes were sent for {payload}");
}

#[test]
fn a_source_that_hangs_in_the_middle_is_asked_again() {
    let mut source = Replica::start(100, &[]);
    let mut here = Replica::start(100, &[]);
    let held = source.hold(1, 16 * 40);
    let hang_once = |number, _| if number == 1 { Plan::HangAfter(90_000) } else { Plan::Pass };
    let proxy = Proxy::start(source.exports, hang_once);
    let report = here.import(held.id, proxy.address).expect("an import");
    assert_eq!((number(&report, "arrived"), number(&report, "retries")), (held.blocks as u64, 1));
    assert_eq!(here.check(&held), held.tokens.len());
}

#[test]
fn spoilt_bytes_are_never_kept() {
    let mut source = Replica::start(100, &[]);
    let held = source.hold(1, 16 * 30);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..5 {
        let mut here = Replica::start(100, &[]);
        // Five connections in a row are spoilt somewhere, then one is not.
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % 200_000
        };
        let mut next = [0; 64].map(|_| random()).into_iter();
        let spoil = move |number: usize, _| match number % 6 {
            5 => Plan::Pass,
            _ => Plan::FlipAt(next.next().unwrap_or(0)),
        };
        let proxy = Proxy::start(source.exports, spoil);
        here.import(held.id, proxy.address).expect("an import");
        assert_eq!(here.check(&held), held.tokens.len(), "round {round}");
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
}

#[test]
fn a_request_is_answered_once() {
    let mut source = Replica::start(40, &[]);
    let here = Replica::start(40, &[]);
    let held = source.hold(1, 16 * 4);
    let proxy = Proxy::start(source.exports, |_, _| Plan::Pass);
    here.import(held.id, proxy.address).expect("an import");
    // Somebody has listened, and says the same again.
    let recorded = proxy.carried();
    assert!(recorded.len() >= 2, "a description and blocks were asked for");
    for carried in recorded {
        let mut again = TcpStream::connect(source.exports).expect("it listens");
        again.write_all(&carried.request()).expect("it reads");
        let (mut words, mut answer) = (String::new(), [0; 1 << 10]);
        // It is put out at last for having signed nothing that counts: no need to wait for that.
        while !words.contains("answered before") {
            let count = again.read(&mut answer).expect("it answers");
            assert_ne!(count, 0, "{words}");
            words.push_str(&String::from_utf8_lossy(&answer[..count]));
        }
        assert!(!words.contains("COLQSECT"), "a section was sent");
    }
}

#[test]
fn a_source_that_says_nothing_is_given_up_by_name() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let here = Replica::start(40, &[]);
    let address = silent.local_addr().expect("its address");
    let gone = free_address();
    let refused = here.import(ConversationId([5; 32]), gone).expect_err("nobody is there");
    assert!(refused.contains(&gone.to_string()), "{refused}");
    let refused = here.import(ConversationId([5; 32]), address).expect_err("it says nothing");
    assert!(refused.contains("said nothing"), "{refused}");
}

#[test]
fn strangers_that_hold_all_connections_are_put_out() {
    let mut source = Replica::start(40, &[]);
    let mut here = Replica::start(40, &[]);
    let held = source.hold(1, 16 * 4);
    let strangers: Vec<TcpStream> =
        (0..100).map(|_| TcpStream::connect(source.exports).expect("it listens")).collect();
    here.import(held.id, source.exports).expect("an import");
    assert_eq!(here.check(&held), held.tokens.len());
    drop(strangers);
}

#[test]
fn no_more_bytes_are_sent_than_the_rate_allows() {
    let rate = 1 << 20;
    let mut source = Replica::start(200, &[&format!("--migration-bytes-per-second={rate}")]);
    let mut here = Replica::start(200, &[]);
    let held = source.hold(1, 16 * 160);
    let begin = Instant::now();
    let report = here.import(held.id, source.exports).expect("an import");
    let least = number(&report, "bytes") as f64 / f64::from(rate);
    // A burst and the last piece need not be waited for.
    let waited = begin.elapsed().as_secs_f64() + 0.4;
    assert!(waited >= least, "{waited} s for {report}");
    assert_eq!(here.check(&held), held.tokens.len());
}

#[test]
fn an_import_displaces_nothing_that_a_waiting_turn_needs() {
    let mut source = Replica::start(100, &[]);
    let mut here = Replica::start(40, &[]);
    let held = source.hold(1, 16 * 60);
    let waiting = here.hold(2, 16 * 30);
    let sequence = here.driver.enqueue(&waiting.tokens, 0);
    let report = here.import(held.id, source.exports).expect("an import");
    assert_eq!(number(&report, "arrived"), held.blocks as u64, "{report}");
    let loaded = here.driver.load_enqueued(sequence, &waiting.tokens).expect("attached");
    assert_eq!((loaded.host, loaded.disk), (30, 0));
    assert_eq!(here.reopened(100).check(&held), held.tokens.len());
}
