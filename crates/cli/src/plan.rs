//! `plan`: what a deploy would do, without doing it.

use crate::args::PlanArgs;
use crate::config_file::{self, app_name};
use crate::{CliError, Exit, Session, apps, local_files, ui};
use dunlin_api::wire::{PlanRequest, PlanShown, PlanStep};
use dunlin_model::AppName;

pub async fn plan(session: &Session, args: PlanArgs) -> Result<Exit, CliError> {
    let (app, body) = request(args)?;
    let shown: PlanShown = session.client.post(&format!("/v1/apps/{app}/plan"), &body).await?;
    if session.json {
        ui::print_json(&shown);
        return Ok(if shown.impossible.is_some() { Exit::Failed } else { Exit::Ok });
    }
    for note in &shown.notes {
        eprintln!("note: {note}");
    }
    if let Some(why) = shown.impossible {
        return Err(CliError::failed(format!("release v{} of {app} would fail: {why}", shown.release))
            .hint("nothing was changed"));
    }
    ui::print_line(&shown.summary);
    if shown.steps.is_empty() {
        return Ok(Exit::Ok);
    }
    let rows: Vec<_> = shown.steps.iter().enumerate().map(|(nth, step)| row(nth + 1, step)).collect();
    ui::print_table(&["", "STEP", "MACHINE", "GROUP", "HOST", "REGION", "WHY"], &rows);
    Ok(Exit::Ok)
}

/// Of the configuration in the directory, as a deploy would read it. Without one, an app that is named is planned for as
/// its release has it.
fn request(args: PlanArgs) -> Result<(AppName, PlanRequest), CliError> {
    let scale = apps::parse_counts(&args.counts)?;
    let has_file = config_file::find(&args.path, args.target.config.as_deref()).is_some();
    if !has_file && args.target.app.is_some() {
        return Ok((app_name(&args.target)?, PlanRequest { image: args.image, config: None, scale }));
    }
    let mut loaded = config_file::load(&args.path, args.target.config.as_deref(), &args.ignore)?;
    if let Some(app) = args.target.app {
        loaded.config.app = Some(app);
    }
    let app = loaded.app_name()?;
    let image = args.image.or_else(|| loaded.config.build.image.clone());
    let config = local_files::read_in(loaded.config, &args.path)?;
    Ok((app, PlanRequest { image, config: Some(config), scale }))
}

fn row(number: usize, step: &PlanStep) -> Vec<String> {
    let machine = match (&step.machine, step.new) {
        (Some(machine), _) => machine.to_string(),
        (None, Some(new)) => format!("new {new}"),
        (None, None) => "-".into(),
    };
    let (host, region) = (step.host.to_string(), step.region.to_string());
    vec![number.to_string(), step.step.clone(), machine, step.group.clone(), host, region, step.why.clone()]
}
