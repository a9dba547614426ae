//! Membership keeps finding the dead, whatever members say about others.

use super::*;
use crate::tests::peer;

/// Passes what both say to each other.
fn talk(one: &mut Members, other: Option<&mut Members>, now_ms: u64) -> Vec<Peer> {
    let (mut down, mut rng, mut other) = (vec![], Rng::new(now_ms), other);
    let mut wishes = one.tick(now_ms, &mut rng);
    let mut back = other.as_mut().map(|other| other.tick(now_ms, &mut rng));
    for _ in 0..20 {
        down.append(&mut wishes.down);
        let mut answers = Wishes::default();
        for (_, bytes) in wishes.sends.drain(..) {
            if let Some(other) = other.as_mut() {
                answers.sends.extend(other.receive(&bytes, now_ms).0.sends);
            }
        }
        answers.sends.extend(back.take().into_iter().flat_map(|back| back.sends));
        for (_, bytes) in answers.sends {
            let more = one.receive(&bytes, now_ms).0;
            wishes.sends.extend(more.sends);
            down.extend(more.down);
        }
    }
    down
}

/// Two that know each other, the first of them with timers of as many made-up members as there may be.
fn flooded() -> (Members, Peer, Peer) {
    let (a, b) = (peer("host/a"), peer("host/b"));
    let mut one = Members::new(a.clone(), vec![b.clone()], Rng::new(1));
    let mut other = Members::new(b.clone(), vec![a.clone()], Rng::new(2));
    (0..5_000).step_by(100).for_each(|ms| drop(talk(&mut one, Some(&mut other), ms)));
    assert_eq!(one.active().count(), 1);
    flood(&mut one, MAX_ORIGINS, 5_000);
    (one, a, b)
}

fn flood(members: &mut Members, count: usize, now_ms: u64) {
    let timer = Timer::RemoveDown(peer("host/made up"));
    let timers = (0..count).map(|_| (Duration::from_secs(600), timer.clone())).collect();
    members.schedule(&mut Wishes { timers, ..Wishes::default() }, now_ms);
}

#[test]
fn the_dead_are_found_however_many_timers_members_have_caused() {
    let (mut one, _, b) = flooded();
    let down: Vec<Peer> = (5_000..25_000).step_by(100).flat_map(|ms| talk(&mut one, None, ms)).collect();
    assert_eq!(down.iter().map(|peer| peer.id).collect::<Vec<_>>(), [b.id]);
    flood(&mut one, MAX_TIMERS + 1, 25_000);
    assert_eq!(one.of_members, MAX_TIMERS, "their number is bounded all the same");
    let mut own = Wishes { timers: vec![(Duration::from_secs(1), Timer::ProbeRandomMember(7))], ..Wishes::default() };
    one.schedule(&mut own, 25_000);
    assert!(one.timers.values().any(|timer| *timer == Timer::ProbeRandomMember(7)));
}

#[test]
fn no_member_makes_the_list_longer_than_a_cluster_can_be() {
    let (mut one, a, b) = flooded();
    let packet = |src: &Peer| {
        let mut out = vec![];
        let header = Header { src: src.clone(), src_incarnation: 0, dst: a.clone(), message: Message::Gossip };
        foca::Codec::encode_header(&mut Codec, &header, &mut out).unwrap();
        out.put_u16(2);
        for name in ["host/c", "host/b"] {
            foca::Codec::encode_member(&mut Codec, &Member::new(peer(name), 0, State::Alive), &mut out).unwrap();
        }
        out
    };
    assert!(one.receive(&packet(&b), 5_000).1, "what it says of those that are known is heard");
    assert!(!one.receive(&packet(&peer("host/d")), 5_000).1);
    assert_eq!(one.active().map(|peer| peer.id).collect::<Vec<_>>(), [b.id]);
}
