//! Builds, on a host that makes an image of nothing.

mod world;

use dunlin_api::wire::BuildEvent;
use dunlin_model::token::Capability;
use ed25519_dalek::SigningKey;
use serde_json::json;
use std::sync::atomic::Ordering;
use std::time::Duration;
use world::World;

fn digest(events: &[BuildEvent]) -> &str {
    match events.last() {
        Some(BuildEvent::Done { digest, .. }) => digest,
        _ => panic!("{events:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_builds_token_lives_from_its_beginning_on() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.host.builds_held.store(true, Ordering::SeqCst);
    let release = async {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        world.host.builds_held.store(false, Ordering::SeqCst);
    };
    let (one, two, ()) = tokio::join!(world.build("web", "", b"one"), world.build("web", "", b"two"), release);
    assert_ne!(digest(&one), digest(&two));
    let waited = |events: &[BuildEvent]| {
        events.iter().any(|event| matches!(event, BuildEvent::Step { message } if message.contains("waiting for another build")))
    };
    assert!(waited(&one) != waited(&two));
    let key: [u8; 32] = std::fs::read(data.path().join("control/token.key")).unwrap().try_into().unwrap();
    let key = SigningKey::from_bytes(&key).verifying_key();
    let jobs = world.host.builds.lock().unwrap().clone();
    let ends: Vec<u64> = jobs.iter().map(|job| Capability::verify(&job.registry_token, &key, 0).unwrap().expires_at_ms).collect();
    assert!(ends[1] - ends[0] >= 1_000, "{ends:?}");
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_of_builds_that_nobody_uses_are_not_kept() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let tags = |world: &World| world.content.tags(&"web".parse().unwrap()).unwrap();
    for tag in ["build-1", "build-2", "build-x", "v1"] {
        world::push_image(&world.content, "web", tag);
    }
    let used = world.content.resolve_tag(&"web".parse().unwrap(), "build-2").unwrap().unwrap();
    let mut body = world::release_body("web", 'a', "good");
    body["image"] = json!(format!("web@{used}"));
    assert_eq!(world.post("/v1/apps/web/releases", body).await.status, 201);
    world.follow("web", 1).await;
    let fresh = digest(&world.build("web", "", b"context").await).to_owned();
    world.control.shutdown().await;
    let world = World::start(data.path()).await;
    world.eventually("the old one is gone", async || !tags(&world).contains(&"build-1".to_owned())).await;
    let left = tags(&world);
    assert_eq!(left.len(), 4, "{left:?}");
    assert!(["build-2", "build-x", "v1"].iter().all(|tag| left.contains(&(*tag).to_owned())), "{left:?}");
    assert!(world.content.has_manifest(&"web".parse().unwrap(), &fresh.parse().unwrap()).unwrap());
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroyed_app_leaves_no_images_to_its_names_next_owner() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    world.create_app("other").await;
    for app in ["web", "other"] {
        world::push_image(&world.content, app, "v1");
    }
    world.call(axum::http::Method::DELETE, "/v1/apps/web", &[], None).await;
    assert_eq!(world.get("/v1/apps/web").await.status, 404);
    assert!(!world.content.has_repo(&"web".parse().unwrap()));
    assert!(world.content.has_repo(&"other".parse().unwrap()));
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_origin_of_a_base_image_made_here_is_told() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let told = |events: &[BuildEvent]| {
        let said = "the image docker.io/library/python:3.11 is the one made here from Debian packages";
        events.iter().filter(|event| matches!(event, BuildEvent::Step { message } if message.starts_with(said))).count()
    };
    assert_eq!(told(&world.build("web", "", b"one").await), 0, "there is none: it came from elsewhere");
    world::push_image(&world.content, "library/python", "3.11");
    assert_eq!(told(&world.build("web", "", b"two").await), 1);
    world.control.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_very_same_is_not_built_again() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    world.create_app("web").await;
    let begun = |world: &World| world.host.builds.lock().unwrap().len();
    let first = digest(&world.build("web", "", b"context").await).to_owned();
    let again = world.build("web", "", b"context").await;
    assert!(matches!(&again[0], BuildEvent::Step { message } if message.starts_with("nothing changed since build-")), "{again:?}");
    assert_eq!((digest(&again), begun(&world)), (first.as_str(), 1));
    let secrets = |value: &'static str| std::collections::BTreeMap::from([("KEY", value)]);
    for (nth, query, secrets, context) in [
        (2, "", secrets("one"), b"context"),
        (3, "", secrets("two"), b"context"),
        (4, "?target=final", secrets("two"), b"context"),
        (5, "?target=final", secrets("two"), b"another"),
        (6, "?target=final&no_cache=true", secrets("two"), b"another"),
    ] {
        assert_ne!(digest(&world.build_with("web", query, &secrets, context).await), first, "{query}");
        assert_eq!(begun(&world), nth, "{query}");
        if nth < 6 {
            world.build_with("web", query, &secrets, context).await;
            assert_eq!(begun(&world), nth, "{query}: the same");
        }
    }
    world.control.shutdown().await;
    // It survives a start; not so where the image is gone, and it is no other app's.
    let world = World::start(data.path()).await;
    world.build("web", "", b"context").await;
    assert_eq!(begun(&world), 0);
    world.create_app("other").await;
    world.build("other", "", b"context").await;
    assert_eq!(begun(&world), 1);
    world.content.delete_manifest(&"web".parse().unwrap(), &first.parse().unwrap()).unwrap();
    world.build("web", "", b"context").await;
    assert_eq!(begun(&world), 2);
    world.control.shutdown().await;
}
