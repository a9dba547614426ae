//! The host's own key, which opens what control sealed to this host.

use anyhow::{Context, bail};
use dunlin_model::seal::OpeningKey;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use zeroize::Zeroizing;

const KEY_BYTES: usize = 32;

/// Reads it, or makes it at the first start.
pub fn host_key(path: &Path) -> anyhow::Result<OpeningKey> {
    let name = path.display();
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    match fs::read(path) {
        Ok(bytes) => {
            let bytes = Zeroizing::new(bytes);
            let mode = fs::metadata(path)?.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                bail!(super::DoNotRestart(format!("the key file {name} may be read by others (mode {mode:o}): `chmod 600` it")));
            }
            let Ok(key) = <[u8; KEY_BYTES]>::try_from(&bytes[..]) else {
                bail!(super::DoNotRestart(format!(
                    "the key file {name} holds {} bytes, not {KEY_BYTES}: restore it from a backup",
                    bytes.len()
                )));
            };
            Ok(OpeningKey::from_bytes(*Zeroizing::new(key)))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let mut key = Zeroizing::new([0; KEY_BYTES]);
            getrandom::fill(&mut *key).map_err(|e| anyhow::anyhow!("the system gives no random numbers: {e}"))?;
            write_private(path, &*key).with_context(|| format!("the key file {name} cannot be written"))?;
            Ok(OpeningKey::from_bytes(*key))
        }
        Err(e) => Err(e).with_context(|| format!("the key file {name} cannot be read")),
    }
}

/// Whole or not at all, and on disk.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_and_is_roots_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host/host.key");
        let made = host_key(&path).unwrap();
        assert_eq!(*made.to_bytes(), *host_key(&path).unwrap().to_bytes());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(host_key(&path).is_err());
    }
}
