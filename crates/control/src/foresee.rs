//! What a deploy would do, without doing it: the release that it would write is planned for by the planner that plans
//! for all of them, from the same rows and facts, and then forgotten.

use crate::failure::Failure;
use crate::releases::{base_of, check_config, load_app, within_limits};
use crate::rows::{SecretsVersionRow, key};
use crate::{Ctx, now_ms, reconcile, spec};
use dunlin_api::ErrorCode;
use dunlin_api::wire::{PlanRequest, PlanShown, PlanStep};
use dunlin_model::desired::{AppRow, MachineRow, ReleaseRow, ReleaseStatus};
use dunlin_model::{AppName, HostId, ImageRef, MachineId, Region};
use dunlin_planner::{Plan, StepKind};
use std::collections::BTreeMap;

/// Stands for an image that is not known yet. It is no digest of any image, and goes nowhere.
const NOT_BUILT_YET: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

pub(crate) async fn plan(ctx: &Ctx, name: &AppName, asked: PlanRequest) -> Result<PlanShown, Failure> {
    let app = load_app(ctx, name).await?.value;
    let releases = ctx.state.list::<ReleaseRow>(&key::releases(name)).await?;
    let current = base_of(&app, &releases);
    let mut notes = Vec::new();
    let image = match (&asked.image, &asked.config, current) {
        (Some(text), _, _) => match ctx.images.resolve_here(name, text).await? {
            Some(image) => image,
            None => {
                notes.push(format!("image {text} is looked up when it is deployed; taken for another one than what runs"));
                not_built_yet(name)
            }
        },
        (None, None, Some(current)) => current.image.clone(),
        (None, ..) => {
            notes.push("the image is still to be built; taken for another one than what runs".into());
            not_built_yet(name)
        }
    };
    let config = match (asked.config, current) {
        (Some(config), _) => check_config(name, config)?,
        (None, Some(current)) => current.config.clone(),
        (None, None) => {
            return Err(Failure::new(ErrorCode::FailedPrecondition, format!("app {name} has no release to plan from"))
                .hint("send a configuration: `dunlin plan` in the app's directory does"));
        }
    };
    let groups = spec::counts(&config, &app.scale);
    if let Some(unknown) = asked.scale.keys().find(|group| !groups.contains_key(*group)) {
        let groups: Vec<_> = groups.keys().map(String::as_str).collect();
        return Err(Failure::invalid(format!("there is no process group {unknown}")).hint(format!("there are {}", groups.join(", "))));
    }
    let scale: BTreeMap<String, u32> = app.scale.clone().into_iter().chain(asked.scale).collect();
    within_limits(&spec::counts(&config, &scale))?;
    let secrets = ctx.state.get::<SecretsVersionRow>(&key::secrets_version(name)).await?;
    let release = ReleaseRow {
        app: name.clone(),
        number: releases.iter().map(|row| row.value.number).max().unwrap_or(0) + 1,
        image,
        config,
        secrets_version: secrets.map_or(0, |row| row.value.version),
        scale: scale.clone(),
        created_at_ms: now_ms(),
        status: ReleaseStatus::Running,
        reason: String::new(),
    };
    let next = AppRow { current_release: release.number, scale, ..app };
    let (plan, impossible) = reconcile::foresee(ctx, &next, &release).await?;
    notes.extend(reconcile::region_note(ctx, &release).await?);
    let machines = ctx.state.machines_of(name).await?;
    Ok(PlanShown {
        app: name.clone(),
        release: release.number,
        from_release: plan.from_release,
        summary: reconcile::summary(&plan),
        notes,
        steps: shown(&plan, machines.into_iter().map(|row| row.value).collect()),
        impossible,
    })
}

fn not_built_yet(app: &AppName) -> ImageRef {
    ImageRef { repository: app.to_string(), digest: NOT_BUILT_YET.into(), tag: None }
}

fn shown(plan: &Plan, machines: Vec<MachineRow>) -> Vec<PlanStep> {
    let mut places: BTreeMap<MachineId, (String, HostId, Region)> =
        machines.into_iter().map(|row| (row.id, (row.spec.process_group, row.host, row.region))).collect();
    let mut new: BTreeMap<MachineId, u32> = BTreeMap::new();
    for step in &plan.steps {
        if let StepKind::Assign { host, region, group, .. } = &step.kind {
            places.insert(step.machine.clone(), (group.clone(), host.clone(), region.clone()));
            let number = new.len() as u32 + 1;
            new.insert(step.machine.clone(), number);
        }
    }
    let steps = plan.steps.iter().filter_map(|step| {
        let (group, host, region) = places.get(&step.machine)?.clone();
        let number = new.get(&step.machine).copied();
        let machine = number.is_none().then(|| step.machine.clone());
        Some(PlanStep { step: step.kind.name().into(), machine, new: number, group, host, region, why: step.why.clone() })
    });
    steps.collect()
}
