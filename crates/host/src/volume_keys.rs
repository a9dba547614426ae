//! Keys of encrypted volumes: one each, random, sealed to the host's own key in a file beside the volume.
//!
//! Whether a volume is encrypted is read off that file and not off its row, so that nothing which is written into a row
//! makes a host take ciphertext for a broken file system. The key is gone before the files are.

use crate::Shared;
use crate::agent::chain;
use crate::volumes::{Place, write_synced};
use dunlin_api::VolumeEncryption;
use dunlin_model::VolumeId;
use dunlin_model::volume::VolumeRow;
use dunlin_runtime::volume::{Encryption, Lacking, VolumeKey, close, forget, trial};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Of the device that device mapper has while the volume is open; ids are unique, also among servers of one computer.
pub fn device_name(id: &VolumeId) -> String {
    format!("dunlin-{id}")
}

/// What the key is sealed for: one that was copied beside another volume opens nothing.
fn context(id: &VolumeId) -> String {
    format!("volume/{id}")
}

/// Tried until it works: an operator who installs what is lacking restarts nothing.
pub fn offer(shared: &Shared) -> VolumeEncryption {
    // Two trials at once would be in each other's way, and what fails then is taken for lacking.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if shared.volumes.encrypts.get().is_some() {
        return VolumeEncryption::Offered;
    }
    match trial(&shared.config.data_dir) {
        Ok(()) => {
            shared.volumes.encrypts.get_or_init(|| ());
            VolumeEncryption::Offered
        }
        Err(Lacking { what, fix }) => VolumeEncryption::Lacking { what, fix },
    }
}

/// How the volume is encrypted; `None`: it is not.
pub fn of(shared: &Shared, id: &VolumeId, place: &Place) -> Result<Option<Encryption>, String> {
    let path = place.key();
    let sealed = match fs::read_to_string(&path) {
        Ok(sealed) => sealed,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(format!("the key of volume {id} cannot be read from {}: {e}", path.display())),
    };
    let opened = shared.config.key.open(&context(id), sealed.trim()).map_err(|e| {
        format!(
            "the key of volume {id} in {} cannot be opened: {e}; restore the host's key that the volume was made with",
            path.display()
        )
    })?;
    let key = VolumeKey::from_bytes(&opened).ok_or_else(|| format!("{} holds no key of a volume", path.display()))?;
    Ok(Some(Encryption { name: device_name(id), key }))
}

/// The key of a volume that is about to be made: that of what it begins as a copy of, or one of its own.
pub fn give(shared: &Shared, row: &VolumeRow, place: &Place) -> Result<Option<Encryption>, String> {
    let id = &row.id;
    let name = device_name(id);
    let encryption = match &row.source {
        Some(source) => {
            let source_place = Place::of(&shared.config.data_dir, &source.volume);
            of(shared, &source.volume, &source_place)?.map(|found| Encryption { name, ..found })
        }
        None if row.encrypted => {
            let key = VolumeKey::random().map_err(|e| format!("volume {id}: no random bytes: {e}"))?;
            Some(Encryption { name, key })
        }
        None => None,
    };
    match &encryption {
        Some(Encryption { key, .. }) => {
            let once = VolumeKey::random().map_err(|e| format!("volume {id}: no random bytes: {e}"))?;
            let sealed = shared.config.key.sealing_key().seal(&context(id), key.bytes(), *once.bytes());
            let sealed = sealed.map_err(|e| format!("the key of volume {id} cannot be sealed: {e}"))?;
            write_synced(&place.key(), &sealed).map_err(|e| format!("the key of volume {id}: {e}"))?;
        }
        None if row.encrypted => return Err(format!("volume {id} is to be encrypted, and what it begins as a copy of is not")),
        None => {}
    }
    Ok(encryption)
}

/// Takes away what opens an encrypted volume and its snapshots: where the disk keeps removed files for a while, they are
/// bytes without a key.
pub fn drop_key(id: &VolumeId, place: &Place) -> Result<(), String> {
    close(&device_name(id)).map_err(|e| chain(&e))?;
    if !place.key().exists() {
        return Ok(());
    }
    let snapshots = fs::read_dir(place.snapshots()).into_iter().flatten().flatten().map(|entry| entry.path());
    let copies = snapshots.filter(|path| path.extension().is_some_and(|extension| extension != "json"));
    let files: Vec<PathBuf> = copies.chain([place.data()]).filter(|path| path.exists()).collect();
    files.iter().try_for_each(|path| forget(path)).map_err(|e| chain(&e))?;
    // The last: a repeat after a kill finds it, and wipes what is left.
    forget(&place.key()).map_err(|e| chain(&e))
}
