//! Collection of images that nothing needs any more.

use dunlin_control::Control;
use dunlin_host::Host;
use dunlin_registry::{ContentStore, Digest, Images};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A push or a pull in the making is younger than the collector's grace of an hour; more often gains nothing.
const EVERY: Duration = Duration::from_secs(3600);

/// Never returns; to be dropped when the server stops.
pub async fn run(control: &Control, content: &ContentStore, images: &Images) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.tick().await; // the first is at once: a start has better things to do
    loop {
        ticks.tick().await;
        if let Err(why) = sweep(control, content, images).await {
            tracing::warn!(why, "images could not be collected; tried again in an hour");
        }
    }
}

/// On a host without control: what none of its machines needs goes, and comes again from another host. Ends with `stop`.
pub async fn of_member(host: Arc<Host>, content: ContentStore, images: Images, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let collected = async {
            let Some(used) = host.images_in_use().await else { return Ok(()) };
            let keep = digests(&used)?;
            let store = content.clone();
            let kept = keep.clone();
            tokio::task::spawn_blocking(move || store.gc(&kept)).await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
            images.gc(&keep).await.map_err(|e| e.to_string()).map(drop)
        };
        if let Err(why) = collected.await {
            tracing::warn!(why, "images could not be collected; tried again in an hour");
        }
    }
}

/// What was deployed after the list was read is no part of it; the collectors leave alone what was used during the
/// last hour, and each gets a list of its own, far younger than that.
async fn sweep(control: &Control, content: &ContentStore, images: &Images) -> Result<(), String> {
    let (store, keep) = (content.clone(), in_use(control).await?);
    let done = tokio::task::spawn_blocking(move || store.gc(&keep)).await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let layers = images.gc(&in_use(control).await?).await.map_err(|e| e.to_string())?;
    if done.blobs_removed > 0 || layers > 0 {
        tracing::info!(blobs = done.blobs_removed, bytes = done.bytes_freed, layers, "images collected");
    }
    Ok(())
}

async fn in_use(control: &Control) -> Result<Vec<Digest>, String> {
    let used = control.images_in_use().await.map_err(|failure| failure.to_string())?;
    digests(&used)
}

/// An unreadable digest would make something in use look unused: collect nothing then.
fn digests(used: &[String]) -> Result<Vec<Digest>, String> {
    used.iter().map(|digest| digest.parse()).collect::<Result<_, _>>().map_err(|e: dunlin_registry::InvalidName| e.to_string())
}
