//! To an object store and back: a folder, and a real S3 server.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use kv_protocol::{ConversationId, Record};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use serde_json::Value;

use crate::replica::{Held, Replica, ask, import, number, transfer};
use crate::support::{Driver, free_address, until};

const KEY: &str = "colloquy";
const KEY_SECRET: &str = "not a secret at all";

/// A store, its URL and what the daemon's environment says of it.
struct Store {
    url: String,
    /// Where its objects are files.
    files: PathBuf,
    environment: Vec<(&'static str, String)>,
    _dir: tempfile::TempDir,
    _server: Option<tokio::runtime::Runtime>,
}

fn folder() -> Store {
    let dir = tempfile::tempdir().expect("a folder");
    let files = dir.path().join("objects");
    let url = format!("file://{}", files.display());
    Store { url, files, environment: Vec::new(), _dir: dir, _server: None }
}

/// `s3s-fs` speaks S3 over HTTP, checks signatures, and keeps objects as files.
fn s3() -> Store {
    let dir = tempfile::tempdir().expect("a folder");
    let files = dir.path().join("bucket");
    std::fs::create_dir(&files).expect("our own folder");
    let service = {
        let store = s3s_fs::FileSystem::new(dir.path()).expect("a folder");
        let mut builder = S3ServiceBuilder::new(store);
        builder.set_auth(SimpleAuth::from_single(KEY, KEY_SECRET));
        builder.build()
    };
    let server = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("threads");
    let listener =
        server.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
    let address = listener.local_addr().expect("its address");
    server.spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service.clone();
            tokio::spawn(async move {
                let http = auto::Builder::new(TokioExecutor::new());
                let _ = http.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    let url = "s3://bucket/some/prefix".to_owned();
    Store { url, files, environment: s3_at(address), _dir: dir, _server: Some(server) }
}

fn s3_at(address: SocketAddr) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ALLOW_HTTP", "true".into()),
        ("AWS_REGION", "us-east-1".into()),
        ("AWS_ACCESS_KEY_ID", KEY.into()),
        ("AWS_SECRET_ACCESS_KEY", KEY_SECRET.into()),
    ]
}

impl Store {
    fn replica(&self, more: &[&str]) -> Replica {
        let url = format!("--remote-url={}", self.url);
        let flags: Vec<&str> = [url.as_str()].into_iter().chain(more.iter().copied()).collect();
        Replica::in_environment(100, &flags, &self.environment)
    }

    /// Files of all objects whose path has `part`.
    fn objects(&self, part: &str) -> Vec<PathBuf> {
        let mut folders = vec![self.files.clone()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    _ => files.push(entry.path()),
                }
            }
        }
        files.retain(|path| path.to_string_lossy().contains(part));
        files
    }
}

fn offload(replica: &Replica, id: &ConversationId) -> Value {
    let path = format!("/conversations/{}/offload?by=id", id.hex());
    transfer(&replica.daemon, &path, &Value::Null).expect("an offload")
}

fn tokens_of(record: &[u8]) -> Vec<u32> {
    Record::decode(record).expect("a record").tokens
}

/// Asks until the record is there: the first question may be answered before the store was.
fn ask_until_there(driver: &mut Driver, held: &Held) {
    let record = until("the record has come", || ask(driver, held.id));
    assert_eq!(tokens_of(&record), held.tokens);
}

fn delete(replica: &Replica, id: &ConversationId) {
    let path = format!("/conversations/{}?by=id", id.hex());
    let (status, answer) = replica.daemon.admin("DELETE", &path, &Value::Null);
    assert_eq!(status, 200, "{answer}");
}

fn goes_there_and_comes_back(store: &Store) {
    let mut source = store.replica(&[]);
    let held = source.hold(1, 16 * 40 + 5);
    let done = offload(&source, &held.id);
    assert_eq!(number(&done, "put"), held.blocks as u64, "{done}");
    assert_eq!(number(&offload(&source, &held.id), "put"), 0, "a block was put twice");
    drop(source);
    // Another daemon, on another node: a turn of the conversation comes to its runtime.
    let mut here = store.replica(&[]);
    ask_until_there(&mut here.driver, &held);
    until("its blocks have come", || {
        (here.daemon.status_u64("/blocks/known") == held.blocks as u64).then_some(())
    });
    assert_eq!(here.check(&held), held.tokens.len());
    // And asked for by name.
    let third = store.replica(&[]);
    let report = import(&third.daemon, held.id, "remote").expect("an import");
    assert_eq!(number(&report, "arrived"), held.blocks as u64, "{report}");
    let nobody = import(&third.daemon, ConversationId([9; 32]), "remote").expect_err("unknown");
    assert!(nobody.contains("no such conversation"), "{nobody}");
}

#[test]
fn a_conversation_goes_to_a_folder_and_comes_back_byte_for_byte() {
    goes_there_and_comes_back(&folder());
}

#[test]
fn a_conversation_goes_to_an_s3_server_and_comes_back_byte_for_byte() {
    goes_there_and_comes_back(&s3());
}

#[test]
fn what_every_tenant_shares_goes_there_once_and_stays_when_a_conversation_is_deleted() {
    let store = folder();
    let mut source = store.replica(&[]);
    source.driver.share(4);
    let held = source.hold(1, 16 * 10);
    let tokens: Vec<u32> = held.tokens[..16 * 4].iter().copied().chain(5000..5032).collect();
    let other = source.hold_tokens("another", tokens);
    assert_eq!(number(&offload(&source, &held.id), "put"), 10);
    assert_eq!(number(&offload(&source, &other.id), "put"), 2, "the rest is there");
    delete(&source, &held.id);
    until("its blocks are gone", || (store.objects("/blocks/").len() == 6).then_some(()));
    let mut here = store.replica(&[]);
    here.driver.share(4);
    import(&here.daemon, other.id, "remote").expect("an import");
    assert_eq!(here.check(&other), other.tokens.len());
}

#[test]
fn a_longer_conversation_is_offloaded_by_what_is_new_and_its_old_tail_leaves() {
    let store = folder();
    let mut source = store.replica(&[]);
    let held = source.hold(1, 16 * 10 + 5);
    offload(&source, &held.id);
    assert_eq!(store.objects("/blocks/").len(), 11);
    let longer = source.hold(1, 16 * 12 + 3);
    assert_eq!(longer.id, held.id);
    assert_eq!(number(&offload(&source, &longer.id), "put"), 3);
    assert_eq!(store.objects("/blocks/").len(), 13, "the old tail stayed");
}

#[test]
fn spoilt_objects_are_misses() {
    let store = folder();
    let mut source = store.replica(&[]);
    let held = source.hold(1, 16 * 40);
    offload(&source, &held.id);
    let objects = store.objects("/blocks/");
    assert_eq!(objects.len(), held.blocks);
    // Each fourth block has one bit spoilt, somewhere else each time; one is cut, one is another's.
    let mut spoilt = 0;
    for (number, path) in objects.iter().enumerate().step_by(4) {
        let mut bytes = std::fs::read(path).expect("an object");
        let at = number * 211 % bytes.len();
        bytes[at] ^= 1 << (number % 8);
        std::fs::write(path, bytes).expect("our own file");
        spoilt += 1;
    }
    let cut = std::fs::read(&objects[1]).expect("an object");
    std::fs::write(&objects[1], &cut[..cut.len() / 2]).expect("our own file");
    std::fs::copy(&objects[2], &objects[3]).expect("our own files");
    spoilt += 2;
    let mut here = store.replica(&[]);
    let report = import(&here.daemon, held.id, "remote").expect("an import");
    assert_eq!(number(&report, "absent"), spoilt, "{report}");
    assert_eq!(number(&report, "arrived"), held.blocks as u64 - spoilt, "{report}");
    here.check(&held); // What is found has the right bytes.
}

#[test]
fn a_dead_store_delays_neither_a_turn_nor_the_end() {
    let store = folder();
    let mut replica = Replica::in_environment(
        100,
        &["--remote-url=s3://bucket", "--remote-on-stop-seconds=3600"],
        &s3_at(free_address()),
    );
    let held = replica.hold(1, 16 * 10);
    for unknown in 0..50 {
        assert_eq!(ask(&mut replica.driver, ConversationId([unknown; 32])), None);
        assert_eq!(replica.check(&held), held.tokens.len());
    }
    let Replica { daemon, driver, dir: _dir, .. } = replica;
    drop(driver);
    assert_eq!(daemon.stop(), Some(0)); // Within the patience of `until`, which a hang would exceed.
    assert!(store.objects("").is_empty());
}

#[test]
fn conversations_used_lately_are_offloaded_when_the_daemon_stops() {
    let store = folder();
    let mut source = store.replica(&["--remote-on-stop-seconds=3600"]);
    let all = [source.hold(1, 16 * 10 + 5), source.hold(2, 16 * 8)];
    let Replica { daemon, driver, dir: _dir, .. } = source;
    drop(driver);
    assert_eq!(daemon.stop(), Some(0));
    assert_eq!(store.objects("/conversations/").len(), 2);
    assert_eq!(store.objects("/blocks/").len(), all[0].blocks + all[1].blocks);
    let mut here = store.replica(&[]);
    for held in &all {
        import(&here.daemon, held.id, "remote").expect("an import");
        assert_eq!(here.check(held), held.tokens.len());
    }
}

#[test]
fn a_deleted_conversation_leaves_the_store_and_does_not_come_back() {
    let store = folder();
    let mut source = store.replica(&[]);
    let mut here = store.replica(&["--deletion-deadline-seconds=3600"]);
    let held = source.hold(1, 16 * 10 + 5);
    // Another one goes the same way at first: it keeps what they share.
    let mut tokens = held.tokens[..16 * 4].to_vec();
    tokens.extend(900_000..900_040);
    let other = source.hold_tokens("the other", tokens);
    offload(&source, &held.id);
    offload(&source, &other.id);
    here.import(held.id, source.exports).expect("an import");
    delete(&source, &held.id);
    until("its objects are gone", || {
        let left = (store.objects("/conversations/").len(), store.objects("/blocks/").len());
        (left == (1, other.blocks)).then_some(())
    });
    assert_eq!(source.check(&other), other.tokens.len());
    // Its tombstone is honoured, wherever a copy may be.
    let refused = source.import(held.id, here.exports).expect_err("deleted");
    assert!(refused.contains("deleted here"), "{refused}");
    let refused = import(&source.daemon, held.id, "remote").expect_err("gone");
    assert!(refused.contains("no such conversation"), "{refused}");
    let refused = here.import(held.id, source.exports).expect_err("deleted at the source");
    assert!(refused.contains("410") && refused.contains("deleted"), "{refused}");
    assert_eq!(here.check(&held), held.tokens.len(), "the copy that nobody deleted");
}

#[test]
fn a_deletion_that_the_store_has_not_seen_outlives_the_worker() {
    let store = folder();
    let mut source = store.replica(&[]);
    let held = source.hold(1, 16 * 10 + 5);
    offload(&source, &held.id);
    // A store that answers with errors: a file where its folder was.
    let (root, aside) = (store.files.join("v1"), store.files.join("aside"));
    std::fs::rename(&root, &aside).expect("our own folder");
    std::fs::write(&root, "no folder").expect("our own folder");
    delete(&source, &held.id);
    source.daemon.kill_worker();
    std::fs::remove_file(&root).expect("our own file");
    std::fs::rename(&aside, &root).expect("our own folder");
    until("another worker has deleted the objects", || store.objects("").is_empty().then_some(()));
}

#[test]
fn a_bad_remote_url_ends_the_daemon_with_a_sentence() {
    let output = std::process::Command::new(crate::replica::BINARY)
        .args(["supervise", "--host-bytes=16MiB", "--remote-url=ftp://somewhere"])
        .arg(format!("--socket={}", Path::new("/nonexistent/daemon.sock").display()))
        .stdin(std::process::Stdio::null())
        .output()
        .expect("it starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{words}");
    assert!(words.contains("s3://BUCKET/PREFIX"), "{words}");
}
