//! `secrets` and `tokens`. Values go to the server and never come back.

use crate::args::{AppArgs, SecretsCommand, TokensCommand};
use crate::config_file::app_name;
use crate::{CliError, Exit, Session, deploy, ui};
use dunlin_api::wire::{CreateToken, CreatedToken, Secrets, SetSecrets};
use dunlin_model::token::Verb;
use std::collections::BTreeMap;
use std::io::Read;

/// What an environment can hold.
const MAX_VALUE_BYTES: u64 = 128 * 1024;

pub async fn secrets(session: &Session, command: SecretsCommand) -> Result<Exit, CliError> {
    match command {
        SecretsCommand::List(args) => {
            let app = app_name(&args)?;
            let list: Secrets = session.client.get(&format!("/v1/apps/{app}/secrets")).await?;
            if session.json {
                ui::print_json(&list.secrets);
            } else {
                let rows: Vec<_> = list.secrets.iter().map(|s| vec![s.name.clone(), s.digest.clone()]).collect();
                ui::print_table(&["NAME", "DIGEST"], &rows);
            }
            Ok(Exit::Ok)
        }
        SecretsCommand::Set { pairs, target, detach, stage } => {
            let mut values = BTreeMap::new();
            for (name, value) in pairs {
                let value = if value == "-" { read_value()? } else { value };
                values.insert(name, Some(value));
            }
            write(session, &target, values, detach, stage).await
        }
        SecretsCommand::Import { target, detach, stage } => {
            let values = parse_lines(&read_value()?)?;
            write(session, &target, values, detach, stage).await
        }
        SecretsCommand::Unset { names, target, detach, stage } => {
            known(session, &target, &names).await?;
            let values = names.into_iter().map(|name| (name, None)).collect();
            write(session, &target, values, detach, stage).await
        }
    }
}

/// A name that is mistyped takes nothing away; the server takes it for one that is gone already.
async fn known(session: &Session, target: &AppArgs, names: &[String]) -> Result<(), CliError> {
    let app = app_name(target)?;
    let there: Secrets = session.client.get(&format!("/v1/apps/{app}/secrets")).await?;
    let is_there = |name: &&String| there.secrets.iter().any(|secret| secret.name == **name);
    match names.iter().find(|name| !is_there(name)) {
        None => Ok(()),
        Some(name) => Err(CliError::failed(format!("app {app} has no secret {name}")).hint(
            "`dunlin secrets list` shows the names; what was unset with --stage leaves the machines with the next `dunlin deploy`",
        )),
    }
}

/// `NAME=VALUE` lines as in a dotenv file: comments, `export`, quotes around the whole value.
fn parse_lines(text: &str) -> Result<BTreeMap<String, Option<String>>, CliError> {
    let mut values = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let Some((name, value)) = line.split_once('=').filter(|(name, _)| !name.trim().is_empty()) else {
            // The line itself is not repeated: it may be a value.
            return Err(CliError::usage(format!("line {} is not NAME=VALUE", number + 1)));
        };
        let value = value.trim();
        let unquoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        values.insert(name.trim().to_owned(), Some(unquoted.unwrap_or(value).to_owned()));
    }
    if values.is_empty() {
        return Err(CliError::usage("standard input names no secrets").hint("for example `dunlin secrets import < .env`"));
    }
    Ok(values)
}

pub(crate) fn read_value() -> Result<String, CliError> {
    let mut value = String::new();
    std::io::stdin()
        .take(MAX_VALUE_BYTES + 1)
        .read_to_string(&mut value)
        .map_err(|e| CliError::failed(format!("the value could not be read from standard input: {e}")))?;
    if value.len() as u64 > MAX_VALUE_BYTES {
        return Err(CliError::usage("the value is longer than 128 KiB").hint("an environment cannot hold more"));
    }
    Ok(value.trim_end_matches('\n').to_owned())
}

async fn write(
    session: &Session,
    target: &AppArgs,
    values: BTreeMap<String, Option<String>>,
    detach: bool,
    stage: bool,
) -> Result<Exit, CliError> {
    let app = app_name(target)?;
    let path = format!("/v1/apps/{app}/secrets{}", if stage { "?stage=true" } else { "" });
    let written: Secrets = session.client.post(&path, &SetSecrets { values }).await?;
    match written.release {
        Some(release) if !detach => deploy::follow(session, &app, release).await,
        _ => {
            if session.json {
                ui::print_json(&written);
            } else {
                ui::print_line(&format!("secrets of {app} are now version {}", written.version));
            }
            Ok(Exit::Ok)
        }
    }
}

pub async fn tokens(session: &Session, command: TokensCommand) -> Result<Exit, CliError> {
    match command {
        TokensCommand::Create { verbs, apps, days } => {
            let body = CreateToken {
                apps: (!apps.is_empty()).then_some(apps),
                verbs: verbs.iter().map(|verb| parse_verb(verb)).collect::<Result<_, _>>()?,
                expires_in_s: days.saturating_mul(86_400),
            };
            let created: CreatedToken = session.client.post("/v1/tokens", &body).await?;
            if session.json {
                ui::print_json(&created);
            } else {
                ui::print_line(&created.token);
                eprintln!("id {}; `dunlin tokens revoke {}` ends it", created.id, created.id);
            }
        }
        TokensCommand::Revoke { id } => {
            session
                .client
                .post::<serde_json::Value>("/v1/tokens/revoke", &serde_json::json!({ "id": id }))
                .await?;
            if session.json {
                ui::print_json(&serde_json::json!({ "id": id, "revoked": true }));
            } else {
                ui::print_line(&format!("revoked {id}"));
            }
        }
    }
    Ok(Exit::Ok)
}

fn parse_verb(text: &str) -> Result<Verb, CliError> {
    serde_json::from_value(serde_json::Value::String(text.to_ascii_lowercase())).map_err(|_| {
        CliError::usage(format!("{text:?} is not a verb")).hint("use read, deploy, admin, exec, pull or push")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_a_dotenv_file() {
        let values = parse_lines("# comment\n\nA=1\nexport B=\"two words\"\nC='x=y'\nD=\n").unwrap();
        let expected = [("A", "1"), ("B", "two words"), ("C", "x=y"), ("D", "")];
        assert_eq!(values, expected.map(|(name, value)| (name.to_owned(), Some(value.to_owned()))).into());
        let error = parse_lines("A=1\nhunter2\n").unwrap_err().message;
        assert!(error.contains("line 2") && !error.contains("hunter2"), "{error}");
        assert!(parse_lines("# nothing").is_err());
    }
}
