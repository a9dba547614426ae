//! `dunlin control backup` and `dunlin control restore`: desired state and control's keys in one file, and control from it
//! on this or another computer.

use crate::keeper;
use anyhow::{Context, bail};
use dunlin_cluster::Member;
use dunlin_control::{restore, write_backup};
use dunlin_model::HostId;
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand)]
pub enum ControlCommand {
    /// Write desired state and control's keys to a file that only the key file opens; the server may run meanwhile
    #[command(after_help = "Example, as root where control runs:\n  dunlin control backup /backup/dunlin.backup --key /root/dunlin-backup.key\n\
                            Keep the key file apart from the backups, and somewhere else than on this computer: whoever has both has the cluster.")]
    Backup {
        file: PathBuf,
        /// File with the key, 32 random bytes; it is made if there is none
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
    },
    /// Let control run on this computer, from a backup; its server is started after that
    #[command(after_help = "Example, on a host of the cluster, control's own being lost:\n  systemctl stop dunlin\n  \
                            dunlin control restore /backup/dunlin.backup --key /root/dunlin-backup.key\n  systemctl start dunlin\n\
                            Machines go on meanwhile. What was made since the backup is taken over from what hosts know; the other hosts follow\n\
                            by themselves. Where control was before it must not be used again: if that server returns, its control stays off.")]
    Restore {
        file: PathBuf,
        /// File with the key that the backup was made with
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Do not wait to hear from another host: none is left
        #[arg(long)]
        alone: bool,
    },
}

pub fn run(command: ControlCommand, data_dir: &Path, json: bool) -> anyhow::Result<()> {
    match command {
        ControlCommand::Backup { file, key } => {
            let host = Member::load(&data_dir.join("cluster"))?.map(|member| member.host);
            let host = host.map_or_else(|| "h1".parse::<HostId>().context("the default host"), Ok)?;
            let is_new = !key.exists();
            let generation = write_backup(data_dir, &host, &key, &file)?;
            if json {
                println!("{}", serde_json::json!({ "file": file, "key": key, "key_is_new": is_new, "host": host, "generation": generation }));
                return Ok(());
            }
            println!("backed up desired state {generation} of host {host} to {}", file.display());
            if is_new {
                eprintln!("hint: the key is new: keep {} apart from the backup; without it nobody restores", key.display());
            }
            Ok(())
        }
        ControlCommand::Restore { file, key, alone } => {
            if let Some(pid) = keeper::holder(data_dir)? {
                bail!("the server of {} (process {pid}) runs\n  hint: stop it first; its machines go on", data_dir.display());
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let restored = runtime.block_on(restore(data_dir, &key, &file, alone))?;
            let dir = data_dir.join("cluster");
            if let Some(mut member) = Member::load(&dir)? {
                member.control = member.host.clone();
                member.said.controls = true;
                member.save(&dir)?;
            }
            if json {
                println!("{}", serde_json::json!({ "from": restored.host, "at_ms": restored.at_ms, "generation": restored.generation }));
                return Ok(());
            }
            println!("restored the control that was on host {}; it goes on here as {}", restored.host, restored.generation);
            eprintln!("hint: start this server; it takes over what the other hosts know, and they follow it by themselves");
            Ok(())
        }
    }
}
