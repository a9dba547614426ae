//! What a new agent makes of a machine that it finds.

use super::{Machine, UNCONFIRMED, failed_attempt};
use crate::event::{Alive, Effect};
use crate::record::Goal;
use dunlin_model::MachineState;

impl Machine {
    /// Never repeats effects from the record blindly: `alive` is what the supervisor and the kernel say.
    /// Always journalled, so that the facts of the next life begin above those of this one.
    pub(super) fn on_recovered(&mut self, alive: Alive, now_ms: u64) -> Vec<Effect> {
        use MachineState as S;
        let attempt = self.record.attempt;
        let schedule = self.record.spec().schedule.as_ref();
        let next = schedule.and_then(|schedule| schedule.next(&self.record.assignment.id, now_ms));
        self.record.due_ms = self.record.due_ms.filter(|due| next.is_none_or(|next| *due <= next)); // the clock was wrong
        let lives = alive.attempt == Some(attempt) && attempt > 0;
        // What lives was started in this boot. An agent that starts again in the same boot asks nothing anew.
        // An exclusive version that is to follow may be taken up right away.
        let is_exclusive = self.record.spec().is_exclusive() || self.record.assignment.spec.is_exclusive();
        self.record.unconfirmed |= alive.rebooted && !lives && is_exclusive;
        let mut effects = match self.record.state {
            S::Destroying => vec![Effect::Destroy],
            S::Destroyed => return vec![Effect::Forget],
            _ if self.record.may_live() && lives => self.rejoin(&alive, now_ms),
            S::Starting | S::Started | S::Suspending | S::Suspended | S::Stopping | S::Updating => match alive.exit {
                Some(exit) => self.on_exited(exit, now_ms),
                None => self.vanished(alive.rebooted, now_ms),
            },
            // It waits for its placement, whichever agent hears of it.
            S::Restarting if self.record.unconfirmed && self.record.restart_at_ms.is_none() => {
                vec![Effect::CleanUp { attempt }]
            }
            S::Restarting => {
                let ms = *self.record.restart_at_ms.get_or_insert(now_ms);
                vec![Effect::CleanUp { attempt }, Effect::WakeAt { ms }]
            }
            S::Creating | S::Created | S::Stopped | S::Failed => {
                vec![Effect::CleanUp { attempt }]
            }
        };
        if !effects.contains(&Effect::Journal) {
            effects = self.changed(now_ms, effects);
        }
        // That it waits is no reason why it could not be prepared.
        let no_problem = self.record.problem.as_deref().is_none_or(|problem| problem == UNCONFIRMED);
        if self.record.state != S::Destroying && !self.record.is_current() && no_problem {
            effects.push(Effect::Prepare(Box::new(self.record.assignment.spec.clone())));
        }
        effects
    }

    /// Its supervisor lives: only what was under way is taken up again.
    fn rejoin(&mut self, alive: &Alive, now_ms: u64) -> Vec<Effect> {
        let attempt = self.record.attempt;
        match self.record.state {
            MachineState::Starting => {
                self.record.state = MachineState::Started;
                self.changed(now_ms, vec![])
            }
            MachineState::Started if alive.frozen => self.changed(now_ms, vec![Effect::Thaw { attempt }]),
            MachineState::Suspending if alive.frozen => {
                self.record.state = MachineState::Suspended;
                self.changed(now_ms, vec![])
            }
            MachineState::Suspending => self.changed(now_ms, vec![Effect::Freeze { attempt }]),
            MachineState::Suspended if !alive.frozen => {
                self.record.state = MachineState::Suspending;
                self.changed(now_ms, vec![Effect::Freeze { attempt }])
            }
            MachineState::Stopping | MachineState::Updating if !alive.stopping => {
                // With the time that is left of what was asked for.
                let asked = self.record.stop;
                let left_ms = asked.map(|stop| stop.until_ms.saturating_sub(now_ms));
                let stop = self.stop(asked.and_then(|stop| stop.signal), left_ms, now_ms);
                self.changed(now_ms, vec![stop])
            }
            _ => Vec::new(),
        }
    }

    /// No supervisor and no exit record: it was killed with its host, or never came up.
    fn vanished(&mut self, rebooted: bool, now_ms: u64) -> Vec<Effect> {
        let attempt = self.record.attempt;
        let never_ran = self.record.state == MachineState::Starting;
        // The run of a schedule is begun once; whether it may be begun again its restart policy says.
        let again = if self.record.spec().schedule.is_some() { never_ran && !rebooted } else { never_ran || rebooted };
        if self.record.goal == Goal::Run && again {
            // Not its failure: at once, and not counted.
            let mut acts = vec![Effect::CleanUp { attempt }];
            acts.extend(self.start_or_wait(now_ms));
            self.note_start(now_ms);
            return self.changed(now_ms, acts);
        }
        let error = if rebooted { "its host was restarted" } else { "its supervisor was killed" };
        self.on_exited(failed_attempt(attempt, error.into(), now_ms), now_ms)
    }
}
