//! Each prompt token is counted once: as a hit by tier or as a miss by reason.

use super::*;

/// Sums a counter over the values of its label.
fn sum(counter: &prometheus::IntCounterVec) -> u64 {
    use prometheus::core::Collector;
    let families = counter.collect();
    let metrics = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
    metrics.map(|metric| metric.get_counter().get_value() as u64).sum()
}

/// What an engine has counted so far is whole.
pub(super) fn add_up(rig: &Rig) {
    let stats = &rig.engine.stats;
    let (hits, misses) = (sum(&stats.cache_hit_tokens), sum(&stats.cache_miss_tokens));
    assert_eq!(stats.cache_query_tokens.get(), hits + misses, "{hits} hits, {misses} misses");
}

fn misses(reply: &Reply) -> Vec<(&'static str, u32)> {
    let account = reply.account.expect("the prompt is complete");
    account.misses().map(|(reason, tokens)| (reason.label(), tokens)).collect()
}

/// A conversation whose first turn is stored, and the prompt of its second: 26 tokens of history have
/// KV, 3 tokens have none.
fn second_turn(rig: &mut Rig) -> Vec<u32> {
    let first = prompt(4, 21);
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    next_turn(&first, &answer, &[9, 8])
}

#[test]
fn a_new_prompt_was_never_stored_and_what_a_turn_adds_is_no_divergence() {
    let mut rig = roomy().rig();
    let second = second_turn(&mut rig);
    assert_eq!(misses(&rig.ask(&prompt(7, 21), 2)), [("never_stored", 20), ("last_token", 1)]);
    let reply = rig.ask(&second, 5);
    assert_eq!(
        (reply.cached.host, misses(&reply)),
        (26, vec![("never_stored", 2), ("last_token", 1)])
    );
    add_up(&rig);
    assert_eq!(rig.engine.stats.cache_query_tokens.get(), 21 + 21 + 29);
}

#[test]
fn what_did_not_come_in_time_is_late_and_the_rest_is_not() {
    let mut rig = roomy().rig();
    let second = second_turn(&mut rig);
    rig.daemon().demote_all();
    rig.daemon().disk_hangs = true;
    let reply = rig.ask(&second, 5);
    // Seven blocks of four were on their way, the last with two tokens of the history.
    assert_eq!(reply.cached.total(), 0);
    assert_eq!(misses(&reply), [("late", 28), ("last_token", 1)]);
    add_up(&rig);
}

#[test]
fn a_daemon_that_never_answered_makes_all_late_and_none_makes_it_off_or_detached() {
    let mut rig = roomy().rig();
    let second = second_turn(&mut rig);
    rig.daemon().is_mute = true;
    assert_eq!(misses(&rig.ask(&second, 5)), [("late", 28), ("last_token", 1)]);
    rig.clear_device();
    rig.daemon().detach();
    assert_eq!(misses(&rig.ask(&second, 5)), [("detached", 28), ("last_token", 1)]);
    let mut alone = RigConfig { cached: false, ..roomy() }.rig();
    assert_eq!(misses(&alone.ask(&second, 5)), [("off", 28), ("last_token", 1)]);
}

#[test]
fn a_load_that_fails_was_no_hit() {
    let mut rig = roomy().rig();
    let second = second_turn(&mut rig);
    rig.daemon().spoil_all();
    let reply = rig.ask(&second, 5);
    assert_eq!(
        (reply.cached.total(), misses(&reply)),
        (0, vec![("checksum", 28), ("last_token", 1)])
    );
    assert_eq!(sum(&rig.engine.stats.cache_hit_tokens), 0);
    add_up(&rig);
}

#[test]
fn a_request_that_forbids_reading_says_so_and_a_cancelled_one_is_not_counted() {
    let mut rig = roomy().rig();
    let second = second_turn(&mut rig);
    let before = rig.engine.stats.cache_query_tokens.get();
    drop(rig.submit(&second, 5));
    rig.run();
    assert_eq!(rig.engine.stats.cache_query_tokens.get(), before);
    let (mut forbids, mut receiver) = request(&second, 5);
    forbids.cache.no_read = true;
    rig.handle.submit(Command::Generate(forbids)).unwrap();
    rig.run();
    assert_eq!(misses(&reply(&mut receiver)), [("no_read", 28), ("last_token", 1)]);
    add_up(&rig);
}

#[test]
fn preempted_prompts_are_counted_once() {
    let mut rig = RigConfig { blocks: 22, ..roomy() }.rig();
    let mut receivers: Vec<_> = (1..=3).map(|seed| rig.submit(&prompt(seed, 12), 28)).collect();
    rig.run();
    assert!(rig.engine.stats.preemptions.get() > 0);
    for receiver in &mut receivers {
        assert_eq!(misses(&reply(receiver)), [("never_stored", 11), ("last_token", 1)]);
    }
    assert_eq!(rig.engine.stats.cache_query_tokens.get(), 36);
    add_up(&rig);
}
