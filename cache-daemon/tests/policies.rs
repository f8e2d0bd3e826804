//! Policies in a real daemon: quotas between two tenants, and a drive that has to last.

mod support;

use std::path::Path;

use support::{Daemon, Driver, conversation, geometry, region_bytes, until};

/// Blocks of a conversation here.
const BLOCKS: u32 = 40;

fn start(dir: &Path, frames: u64, more: &[&str]) -> Daemon {
    let binary = Path::new(env!("CARGO_BIN_EXE_cache-daemon"));
    Daemon::start(binary, dir, region_bytes(frames), more)
}

fn tenant(daemon: &Daemon, salt: &[u8]) -> Driver {
    let mut driver = Driver::spawn(&daemon.socket, geometry(), salt);
    driver.wait_attached();
    driver
}

/// How many of the quiet tenant's ten conversations are whole after the noisy one has sent sixty, which are
/// more than all that the disk holds.
fn whole_beside_a_noisy_tenant(share: u8) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let shares = [format!("--tenant-host-share={share}"), format!("--tenant-disk-share={share}")];
    let daemon = start(dir.path(), 64, &["--disk-bytes=16777216", &shares[0], &shares[1]]);
    let (mut quiet, mut noisy) = (tenant(&daemon, b"quiet"), tenant(&daemon, b"noisy"));
    let conversations: Vec<_> = (0..10).map(|number| conversation(number, 16 * BLOCKS)).collect();
    for tokens in &conversations {
        quiet.save(tokens).unwrap();
    }
    until("the quiet tenant's blocks are on disk", || {
        (daemon.status_u64("/writes") == 10 * u64::from(BLOCKS)).then_some(())
    });
    for number in 100..160 {
        noisy.save(&conversation(number, 16 * BLOCKS)).unwrap();
    }
    until("the disk tier has dropped many blocks", || {
        (daemon.status_u64("/evictions_disk") > 700).then_some(())
    });
    let is_whole = |tokens: &&Vec<u32>| quiet.load(tokens).unwrap().tokens == tokens.len();
    conversations.iter().filter(is_whole).count()
}

#[test]
fn a_noisy_tenant_pushes_out_a_quiet_one_only_where_there_is_no_quota() {
    assert!(whole_beside_a_noisy_tenant(100) < 10, "the noise was not loud enough");
    assert_eq!(whole_beside_a_noisy_tenant(50), 10);
}

#[test]
fn a_drive_that_has_to_last_takes_first_what_was_used_again() {
    let dir = tempfile::tempdir().unwrap();
    // A mebibyte an hour: the first half for everything, the other for what was used again.
    let daemon = start(dir.path(), 512, &["--disk-write-bytes-per-day=24MiB"]);
    let mut driver = tenant(&daemon, b"");
    let conversations: Vec<_> = (0..5).map(|number| conversation(number, 16 * BLOCKS)).collect();
    for tokens in &conversations {
        driver.save(tokens).unwrap();
    }
    let spared = r#"colloquy_cache_disk_writes_skipped_total{reason="budget"}"#;
    until("each block is written or spared", || {
        let metrics = daemon.get("/metrics");
        let line = metrics.lines().find_map(|line| line.strip_prefix(spared))?;
        let spared: u64 = line.trim().parse().ok()?;
        (daemon.status_u64("/writes") + spared == 5 * u64::from(BLOCKS)).then_some(())
    });
    let stored = || daemon.status_u64("/disk/stored_bytes");
    let before = stored();
    assert!((400 << 10..=512 << 10).contains(&before), "{before} bytes are about half of it");
    let last = &conversations[4];
    assert_eq!(driver.load(last).unwrap().host, BLOCKS as usize);
    until("what was used again is written", || (stored() > before + (300 << 10)).then_some(()));
    assert!(stored() <= 1 << 20);
}

fn config(daemon: &Daemon, arguments: &[&str]) -> Result<serde_json::Value, String> {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_kvctl"))
        .arg(format!("--socket={}", daemon.admin_socket().display()))
        .args(["--json", "config"])
        .args(arguments)
        .output()
        .unwrap();
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout).unwrap());
    }
    Err(String::from_utf8(output.stderr).unwrap())
}

#[test]
fn settings_change_while_conversations_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(dir.path(), 64, &["--disk-bytes=64MiB"]);
    let mut driver = tenant(&daemon, b"");
    let conversations: Vec<_> = (0..60).map(|number| conversation(number, 16 * BLOCKS)).collect();
    for tokens in &conversations {
        driver.save(tokens).unwrap();
    }
    until("all is on disk", || {
        (daemon.status_u64("/writes") == 60 * u64::from(BLOCKS)).then_some(())
    });
    let stored = || daemon.status_u64("/disk/stored_bytes");
    assert!(stored() > 16 << 20);
    let change =
        ["--policy=lru", "--disk-bytes=16MiB", "--tenant-host-share=90", "--ttl-seconds=900"];
    let in_force = config(&daemon, &change).unwrap();
    assert_eq!(in_force["policy"], "lru");
    assert_eq!(in_force["disk_bytes"], 16 << 20);
    assert_eq!(config(&daemon, &[]).unwrap(), in_force);
    // A quarter of the room: what was used least recently leaves, what is used last stays whole.
    until("the tier is as small as it was told to be", || (stored() <= 16 << 20).then_some(()));
    assert!(stored() > 8 << 20, "no more leaves than must");
    assert!(driver.load(&conversations[0]).unwrap().tokens < conversations[0].len());
    for tokens in conversations.iter().rev().take(5) {
        assert_eq!(driver.load(tokens).unwrap().tokens, tokens.len());
    }
    config(&daemon, &["--host-percent=25", "--migration-bytes-per-second=1MiB"]).unwrap();
    let frames = |state: &str| daemon.status_u64(&format!("/frames/{state}"));
    until("few frames hold blocks", || (frames("ready") <= 16).then_some(()));
    driver.save(&conversations[0]).unwrap();
    assert_eq!(driver.load(&conversations[0]).unwrap().tokens, conversations[0].len());
    while driver.client.poll().is_some() {} // Gives the pins back.
    until("few still do", || (frames("ready") + frames("pinned") <= 16).then_some(()));
    let in_force = config(&daemon, &["--host-percent=100"]).unwrap();
    assert_eq!(in_force["migration_bytes_per_second"], 1 << 20);
    let refused = config(&daemon, &["--disk-bytes=1MiB"]).unwrap_err();
    assert!(refused.contains("must be at least 16777216"), "{refused}");
    assert!(config(&daemon, &["--tenant-disk-share=0"]).unwrap_err().contains("1 to 100"));
    assert_eq!(config(&daemon, &[]).unwrap(), in_force, "what is refused changes nothing");
    // More than it was started with: its files grow, all blocks find room.
    config(&daemon, &["--disk-bytes=128MiB"]).unwrap();
    let more: Vec<_> = (100..300).map(|number| conversation(number, 16 * BLOCKS)).collect();
    for tokens in &more {
        driver.save(tokens).unwrap();
    }
    until("more is stored than fitted before", || (stored() > 52 << 20).then_some(()));
    assert_eq!(driver.load(&more[0]).unwrap().tokens, more[0].len());
}

#[test]
fn bad_shares_and_rates_end_with_a_sentence() {
    for bad in
        ["--tenant-host-share=0", "--tenant-disk-share=101", "--disk-drive-writes-per-day=-1"]
    {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_cache-daemon"))
            .args(["supervise", "--host-bytes=64MiB", bad])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(64), "{bad}");
        assert!(!output.stderr.is_empty(), "{bad}");
    }
}
