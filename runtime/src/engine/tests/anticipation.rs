//! Turns that are foretold before they are asked for.

use super::*;
use crate::cache_client::{ANTICIPATED_FOR, SequenceTag, Unavailable};
use crate::request::Anticipate;

impl Rig {
    fn anticipate(&mut self, conversation: &str, tokens: &[u32]) -> Result<(), Unavailable> {
        let (answer, mut told) = oneshot::channel();
        let turn = Anticipate {
            start: None,
            salt: Salt::default(),
            conversation: conversation.into(),
            tokens: tokens.into(),
            answer,
        };
        self.handle.submit(Command::Anticipate(turn)).unwrap();
        self.step();
        told.try_recv().unwrap()
    }

    fn submit_turn(
        &mut self,
        conversation: &str,
        tokens: &[u32],
    ) -> mpsc::UnboundedReceiver<Event> {
        let (mut request, receiver) = request(tokens, 5);
        request.conversation = Some(conversation.into());
        self.handle.submit(Command::Generate(request)).unwrap();
        receiver
    }

    fn tags(&self) -> Vec<SequenceTag> {
        self.engine.cache.as_ref().unwrap().tags()
    }

    fn counted(&self, outcome: &str) -> u64 {
        self.engine.stats.anticipations.with_label_values(&[outcome]).get()
    }
}

#[test]
fn an_anticipated_turn_becomes_the_queued_one_under_its_tag() {
    let mut rig = RigConfig { sequences_max: 1, ..roomy() }.rig();
    let first = prompt(4, 21);
    let answer = rig.ask(&first, 6).tokens;
    rig.clear_device();
    rig.anticipate("typing", &next_turn(&first, &answer, &[])).unwrap();
    let [tag] = rig.tags()[..] else { panic!("one turn is foretold: {:?}", rig.tags()) };
    // It has to wait behind another, so that it can be seen in the queue.
    let _running = rig.submit(&prompt(6, 8), 20);
    rig.step();
    let mut receiver = rig.submit_turn("typing", &next_turn(&first, &answer, &[9, 8]));
    rig.step();
    assert_eq!(rig.tags(), [tag]);
    rig.run();
    assert_eq!(reply(&mut receiver).cached.host, 26);
    assert_eq!(rig.tags(), []);
    assert_eq!((rig.counted("told"), rig.counted("came"), rig.counted("expired")), (1, 1, 0));
}

#[test]
fn another_tenants_turn_of_that_name_is_not_the_anticipated_one() {
    let mut rig = roomy().rig();
    rig.anticipate("typing", &prompt(4, 21)).unwrap();
    let (mut request, _receiver) = request(&prompt(4, 25), 5);
    request.conversation = Some("typing".into());
    request.salt = Salt(Arc::from(*b"somebody else"));
    rig.handle.submit(Command::Generate(request)).unwrap();
    rig.run();
    assert_eq!((rig.tags().len(), rig.counted("came")), (1, 0));
}

#[test]
fn an_anticipated_turn_that_may_not_read_the_cache_leaves_nothing_behind() {
    let mut rig = roomy().rig();
    rig.anticipate("typing", &prompt(4, 21)).unwrap();
    let (mut request, _receiver) = request(&prompt(4, 25), 5);
    request.conversation = Some("typing".into());
    request.cache.no_read = true;
    rig.handle.submit(Command::Generate(request)).unwrap();
    rig.run();
    assert_eq!(rig.tags(), []);
}

#[test]
fn an_anticipation_ends_at_its_age_unless_it_is_told_again() {
    let mut rig = roomy().rig();
    let pass = |rig: &Rig, time: Duration| {
        rig.clock.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    };
    rig.anticipate("typing", &prompt(4, 21)).unwrap();
    rig.anticipate("gone away", &prompt(5, 21)).unwrap();
    pass(&rig, ANTICIPATED_FOR / 2);
    rig.anticipate("typing", &prompt(4, 21)).unwrap();
    pass(&rig, ANTICIPATED_FOR / 2);
    rig.step();
    assert_eq!((rig.tags().len(), rig.counted("expired")), (1, 1));
    assert!(rig.engine.wait_max() <= ANTICIPATED_FOR / 2);
    pass(&rig, ANTICIPATED_FOR / 2);
    rig.step();
    assert_eq!((rig.tags().len(), rig.counted("expired"), rig.counted("told")), (0, 2, 2));
}

#[test]
fn of_too_many_anticipations_the_oldest_gives_way() {
    let mut rig = roomy().rig();
    for number in 0..300 {
        rig.anticipate(&number.to_string(), &prompt(number, 9)).unwrap();
    }
    assert_eq!((rig.tags().len(), rig.counted("gave_way")), (256, 44));
    let mut first = rig.submit_turn("0", &prompt(0, 12));
    let mut last = rig.submit_turn("299", &prompt(299, 12));
    rig.run();
    assert!(reply(&mut first).finish.is_some() && reply(&mut last).finish.is_some());
    assert_eq!(rig.counted("came"), 1);
}

#[test]
fn a_daemon_that_comes_back_is_told_again_what_is_foretold() {
    let mut rig = roomy().rig();
    rig.anticipate("typing", &prompt(4, 21)).unwrap();
    rig.daemon().detach();
    rig.step();
    assert_eq!(rig.anticipate("too late", &prompt(5, 21)), Err(Unavailable));
    let before = rig.daemon().hints;
    rig.daemon().attach();
    rig.step();
    assert_eq!(rig.daemon().hints, before + 1);
    let mut uncached = RigConfig { cached: false, ..roomy() }.rig();
    assert_eq!(uncached.anticipate("nobody listens", &prompt(4, 21)), Err(Unavailable));
}
