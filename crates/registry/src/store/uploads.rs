//! Uploads that clients have begun and not finished yet. They live as long as this process.

use super::BlobWriter;
use crate::digest::Repo;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Open files and their space.
const MAX_UPLOADS: usize = 256;
/// Of one repository, so that none keeps the others from pushing. Clients push up to six blobs at a time, and a few
/// may push the same app at once.
const MAX_UPLOADS_OF_REPO: usize = 32;
/// An upload that nobody touched for this long was given up.
const MAX_IDLE: Duration = Duration::from_secs(3600);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UploadError {
    #[error("there is no such upload; begin it again")]
    Unknown,
    #[error("another request writes to this upload")]
    Busy,
    #[error("{0}")]
    TooMany(String),
    #[error("the kernel gave no random bytes: {0}")]
    Random(String),
}

#[derive(Default)]
pub(crate) struct Uploads {
    open: Mutex<BTreeMap<String, Upload>>,
}

struct Upload {
    repo: Repo,
    used: Instant,
    /// `None` while a request writes to it.
    writer: Option<BlobWriter>,
}

impl Uploads {
    /// Returns the name under which it is gone on with.
    pub fn add(&self, repo: &Repo, writer: BlobWriter) -> Result<String, UploadError> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|e| UploadError::Random(e.to_string()))?;
        let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        self.drop_idle();
        let mut open = self.lock();
        let own = open.values().filter(|upload| upload.repo == *repo).count();
        if own >= MAX_UPLOADS_OF_REPO {
            return Err(UploadError::TooMany(format!("{own} uploads to {repo} are open; finish or cancel some, then try again")));
        }
        if open.len() >= MAX_UPLOADS {
            return Err(UploadError::TooMany(format!("{MAX_UPLOADS} uploads are open; try again in a moment")));
        }
        open.insert(id.clone(), Upload { repo: repo.clone(), used: Instant::now(), writer: Some(writer) });
        Ok(id)
    }

    /// Takes the writer out; it is put back by `Taken`, whatever happens to the request.
    pub fn take<'a>(&'a self, repo: &Repo, id: &str) -> Result<Taken<'a>, UploadError> {
        let mut open = self.lock();
        let upload = open.get_mut(id).filter(|upload| upload.repo == *repo).ok_or(UploadError::Unknown)?;
        let writer = upload.writer.take().ok_or(UploadError::Busy)?;
        Ok(Taken { uploads: self, id: id.to_owned(), writer: Some(writer) })
    }

    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Gives up what nobody goes on with, and its space.
    pub fn drop_idle(&self) {
        self.drop_older_than(MAX_IDLE);
    }

    fn drop_older_than(&self, idle: Duration) {
        self.lock().retain(|_, upload| upload.writer.is_none() || upload.used.elapsed() < idle);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Upload>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }
}

pub(crate) struct Taken<'a> {
    uploads: &'a Uploads,
    id: String,
    pub writer: Option<BlobWriter>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut open = self.uploads.lock();
        match self.writer.take() {
            Some(writer) => {
                if let Some(upload) = open.get_mut(&self.id) {
                    (upload.writer, upload.used) = (Some(writer), Instant::now());
                }
            }
            // It was finished, or lost with a request that was cut in the middle of a write.
            None => drop(open.remove(&self.id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ContentStore;

    #[test]
    fn no_repository_takes_all_and_the_idle_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::open(dir.path()).unwrap();
        let (web, api): (Repo, Repo) = ("web".parse().unwrap(), "api".parse().unwrap());
        let begin = |repo: &Repo| store.uploads().add(repo, store.begin_blob().unwrap());
        let files = || std::fs::read_dir(dir.path().join("uploads")).unwrap().count();
        let ids: Vec<String> = (0..MAX_UPLOADS_OF_REPO).map(|_| begin(&web).unwrap()).collect();
        assert!(matches!(begin(&web), Err(UploadError::TooMany(why)) if why.contains("web")));
        begin(&api).unwrap();
        assert_eq!(files(), MAX_UPLOADS_OF_REPO + 1);
        assert_eq!(store.uploads().take(&api, &ids[0]).err(), Some(UploadError::Unknown));

        let busy = store.uploads().take(&web, &ids[0]).unwrap();
        assert_eq!(store.uploads().take(&web, &ids[0]).err(), Some(UploadError::Busy));
        store.gc(&[]).unwrap();
        assert_eq!(files(), MAX_UPLOADS_OF_REPO + 1, "the young stay");
        store.uploads().drop_older_than(Duration::ZERO);
        assert_eq!(files(), 1, "what a request writes to stays");
        drop(busy);
        assert!(store.uploads().take(&web, &ids[0]).is_ok() && store.uploads().take(&web, &ids[1]).is_err());
    }
}
