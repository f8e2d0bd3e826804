//! A real runtime over a daemon whose frames hold one of three conversations: turns wait in the queue,
//! their hints bring back what was demoted, and every answer is the one computed without a cache.

mod support;

use runtime::weights::random::write_tiny_gguf;
use support::daemon::Daemon;
use support::{Runtime, TOKENS_PER_BLOCK, beside_us, prompt, region_bytes};

const CONVERSATIONS: u32 = 3;
const ROUNDS: u32 = 4;
/// Of a first turn; each later turn brings this many more.
const TURN_TOKENS: u32 = 16 * 12;

#[test]
fn with_room_for_one_of_three_conversations_no_answer_changes() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("tiny.gguf");
    write_tiny_gguf(&path, 7).expect("the tiny model");
    // The longest conversation, and what is being saved while it is pinned.
    let blocks = u64::from(ROUNDS * TURN_TOKENS) / TOKENS_PER_BLOCK as u64;
    let daemon = Daemon::start(
        &beside_us("cache-daemon", "COLLOQUY_CACHE_DAEMON"),
        dir.path(),
        region_bytes(&path, blocks * 3 / 2),
        &[],
    );
    // One sequence at a time: the others wait in the queue, and their hints run ahead of them.
    let one_by_one = ["--sequences-max=1", "--device-bytes=64Mi"];
    let cached = Runtime::start(&path, Some(&daemon.socket), &one_by_one);
    let cold = Runtime::start(&path, None, &one_by_one);
    let mut cached_tokens = 0;
    for round in 1..=ROUNDS {
        let clients: Vec<_> = (0..CONVERSATIONS)
            .map(|conversation| {
                let client = cached.client();
                std::thread::spawn(move || {
                    client.ask(&prompt(conversation, round * TURN_TOKENS), "")
                })
            })
            .collect();
        for (conversation, client) in (0..CONVERSATIONS).zip(clients) {
            let answer = client.join().expect("no request failed");
            let expected = cold.client().ask(
                &prompt(conversation, round * TURN_TOKENS),
                &format!("cold {round} {conversation}"),
            );
            assert_eq!(expected.cached_tokens, 0);
            assert_eq!(answer.text, expected.text, "conversation {conversation}, round {round}");
            cached_tokens += answer.cached_tokens;
        }
        cached.client().clear_device();
    }
    assert!(cached_tokens > 0, "no history came from the cache");
    assert!(daemon.status_u64("/promotes_by_hint") > 0, "{}", daemon.status());
    assert!(daemon.status_u64("/evictions_host") > 0, "{}", daemon.status());
    cached.stop();
    cold.stop();
}
