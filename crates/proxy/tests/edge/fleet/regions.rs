//! Regions that requests name, and what an edge does of which nobody tells it the news.

use super::*;

#[tokio::test]
async fn a_request_may_name_regions() {
    let (near, near_heads) = upstream(Does::Echo).await;
    let (far, far_heads) = upstream(Does::Echo).await;
    let members = Members::new();
    let (one, other) = (members.edge("h1", "fra", Limits::default()), members.edge("h2", "ams", Limits::default()));
    let machines = [Machine { region: "fra", ..machine(near) }, Machine { region: "ams", ..on_h2(far) }];
    one.set(&machines);
    other.set(&machines);
    let ask = async |field: &str| raw(one.http, &format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n{field}\r\n")).await;
    for (field, status, near, far) in [
        ("", 200, 1, 0),
        ("fly-prefer-region: ams,fra\r\n", 200, 1, 1),
        ("fly-force-region: ams\r\n", 200, 1, 2),
        ("fly-prefer-region: syd\r\n", 200, 2, 2),
        ("fly-force-region: syd\r\n", 404, 2, 2),
        ("fly-force-region: ???\r\n", 400, 2, 2),
    ] {
        let answer = ask(field).await;
        assert_eq!(answer.status, status, "{field}: {}", answer.body);
        assert_eq!((near_heads.load(SeqCst), far_heads.load(SeqCst)), (near, far), "{field}");
        if status == 200 {
            assert_eq!(header(&answer.body, "fly-region"), Some("fra"), "where it came in");
        }
    }
}

/// One edge gets no news: the machine that it knows is another by now, or gone. The machine's host knows where to.
#[tokio::test]
async fn an_edge_that_hears_nothing_is_helped_by_one_that_does() {
    let (address, heads) = upstream(Does::Echo).await;
    let (_members, one, other) = two(&[on_h2(address), on_h2(address)]);
    for refusal in [AdmitRefusal::OtherVersion, AdmitRefusal::NotHere] {
        other.host.refusals.lock().unwrap().insert(id(0), refusal);
        for heard in [Freshness::Fresh, Freshness::Aging, Freshness::Old] {
            one.set_heard(&[on_h2(address)], &[("h2", heard)]);
            let before = (heads.load(SeqCst), metric(&other, "hop_rerouted_total"));
            let (read, answer) = (get(one.http, "/").await, raw(one.http, POST).await);
            assert!(read.status == 200 && answer.status == 200 && answer.body.ends_with("body"), "{heard:?}: {}", answer.body);
            assert_eq!((heads.load(SeqCst), metric(&other, "hop_rerouted_total")), (before.0 + 2, before.1 + 2));
        }
    }
    let (before, forced) = (metric(&other, "hop_rerouted_total"), format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nfly-force-instance-id: {}\r\n\r\n", id(0)));
    let _ = tokio::time::timeout(Duration::from_secs(2), raw(one.http, &forced)).await; // no other will do
    assert_eq!(metric(&other, "hop_rerouted_total"), before);
}

#[tokio::test]
async fn the_first_request_for_an_app_of_another_region_waits_until_it_is_known_what_runs_there() {
    let (address, _) = upstream(Does::Echo).await;
    let members = Members::new();
    let (one, other) = (members.edge("h1", "ams", Limits::default()), members.edge("h2", "local", Limits::default()));
    let machines = [on_h2(address)];
    other.set(&machines);
    one.set_unseen(&machines);
    let request = "GET / HTTP/1.1\r\nhost: web.example.test\r\n\r\n";
    let asked = || members.asked.lock().unwrap().clone();
    let comes = async {
        eventually("it is asked for", || asked() == ["web in local"]).await;
        one.set(&machines);
    };
    let (answer, ()) = tokio::join!(raw(one.http, request), comes);
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(raw(one.http, request).await.status, 200);
    assert_eq!(asked().len(), 1, "that it is still used is not said with every request");
    // It is forgotten, and does not come again.
    one.set_unseen(&machines);
    let answer = raw(one.http, request).await;
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("PR15") && answer.body.contains("local"), "{}", answer.body);
}
