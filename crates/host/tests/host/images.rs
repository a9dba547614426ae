//! Images of a host that has none of its own.

use crate::setup::World;
use dunlin_model::{HostId, MachineState};
use dunlin_registry::peer::{Dial, Duplex, Peers, serve};
use dunlin_registry::{ContentStore, Digest, Images};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// This host's store is empty, and what was its store is that of `w1`.
fn from_another_host() -> World {
    let mut world = World::without_host();
    let others = std::mem::replace(&mut world.content, ContentStore::open(world.dir.path().join("own")).unwrap());
    world.images = Images::open(world.dir.path().join("images"), world.content.clone()).unwrap();
    let dial: Dial = Arc::new(move |_| {
        let others = others.clone();
        Box::pin(async move {
            let (near, far) = tokio::io::duplex(64 << 10);
            tokio::spawn(serve(far, "h2".parse().unwrap(), others));
            Ok(Box::new(near) as Box<dyn Duplex>)
        })
    });
    let w1: HostId = "w1".parse().unwrap();
    world.images.fetch_from(Peers::new(dial, move || vec![w1.clone()]));
    world.start_host();
    world
}

pub fn they_come_from_another_host_and_only_they_are_kept() {
    let mut world = from_another_host();
    let id = world.started(1, "echo up; sleep 1000", |_| {});
    world.until("it runs", || world.printed(&id).contains(&"up".to_owned()).then_some(()));
    let image = world.config.machines[&id].spec.image.digest.clone();
    let in_use = || world.block_on(world.host().images_in_use()).unwrap();
    assert_eq!(in_use(), std::slice::from_ref(&image));
    let collect = |keep: &[String]| {
        let keep: Vec<Digest> = keep.iter().map(|digest| digest.parse().unwrap()).collect();
        let blobs = world.content.gc_older_than(&keep, Duration::ZERO).unwrap().blobs_removed;
        (blobs, world.block_on(world.images.gc_older_than(&keep, Duration::ZERO)).unwrap())
    };
    assert_eq!(collect(&in_use()), (0, 0));

    // A view that lost its rows is no word about a machine that runs.
    let config = std::mem::take(&mut world.config);
    world.config.generation = config.generation;
    world.config.generation.revision += 1;
    world.publish();
    assert_eq!(world.block_on(world.host().images_in_use()).unwrap(), [image]);

    // It is destroyed: then it goes.
    world.config.machines = config.machines;
    world.destroy(&id);
    world.until("gone", || world.fact(&id).is_none().then_some(()));
    world.until("nothing is in use", || world.block_on(world.host().images_in_use()).unwrap().is_empty().then_some(()));
    let (blobs, layers) = (world.content.gc_older_than(&[], Duration::ZERO).unwrap(), world.images.gc_older_than(&[], Duration::ZERO));
    assert_eq!((blobs.blobs_removed, world.block_on(layers).unwrap()), (3, 1));
}

pub fn one_that_no_host_has_is_the_machines_problem() {
    let mut world = from_another_host();
    let digest = Digest::of(b"nothing");
    let id = world.assign(1, "true", |spec| spec["image"]["digest"] = json!(digest));
    let problem = world.wait_for(&id, MachineState::Failed).problem.unwrap();
    assert!(problem.contains(&format!("no host has {digest}: w1 does not have it")), "{problem}");
}
