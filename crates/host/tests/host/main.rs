//! The host agent with real machines: a journal, supervisors, networks and a firewall of its own. Needs root
//! and busybox. A binary without libtest, because it is also what the agent starts as supervisor.

mod admission;
mod builder;
mod checks;
mod clock;
mod cpus;
mod exec;
mod files;
mod firewall;
mod images;
mod last_hop;
mod life;
mod logs;
mod neighbours;
mod ps;
mod ready;
mod reboot;
mod rootfs;
mod setup;
mod sleep;
mod tombstones;
mod volumes;

use nix::sched::{CloneFlags, unshare};
use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::Instant;

type Test = (&'static str, fn());

/// `tests![module: name, name; ...]`: each with its path.
macro_rules! tests {
    ($($module:ident: $($name:ident),+ $(,)?;)+) => {
        &[$($((concat!(stringify!($module), "::", stringify!($name)), $module::$name as fn())),+),+]
    };
}

const TESTS: &[Test] = tests![
    admission: a_promise_holds_until_the_start, an_update_that_does_not_fit_is_refused;
    builder: a_caller_that_goes_away_leaves_no_builder, a_reader_that_stalls_holds_nobody_up;
    checks: what_an_app_answers_stays_on_its_host, a_command_in_the_machine_is_a_check;
    clock: the_clock_starts_a_machine_at_its_minute, a_console_ends_when_nobody_is_attached_any_more;
    cpus: performance_machines_have_their_own_and_others_the_rest;
    exec: a_reader_that_stalls_keeps_no_thread, an_app_takes_no_more_than_half_of_the_sessions, a_refusal_says_why, a_terminal_is_typed_at_resized_and_hung_up,
        input_flows_as_fast_as_it_is_read, a_session_without_a_byte_ends;
    files: a_machine_has_its_files_and_those_of_its_secrets;
    firewall: it_comes_back_when_somebody_flushes_it, a_docker_that_starts_later_cuts_nobody_off,
        a_host_without_name_servers_starts_and_follows_when_it_gets_some;
    images: they_come_from_another_host_and_only_they_are_kept, one_that_no_host_has_is_the_machines_problem;
    last_hop: a_request_that_gives_up_leaves_the_machine_to_be_woken_by_the_next,
        a_thousand_requests_are_one_start_and_hear_of_its_end, a_request_does_not_wait_for_one_that_goes_on_crashing,
        what_must_not_be_woken_is_not,
        a_request_is_answered_before_its_machine_is_told_to_stop;
    logs: the_newest_lines_are_the_last_of_all_machines, tails_that_nobody_reads_take_up_so_much_memory_and_no_more,
        a_machine_that_prints_without_end_loses_lines_and_is_nobodys_trouble,
        a_follower_hears_machines_that_come_and_attempts_that_follow;
    neighbours: a_prefix_that_another_server_uses_is_refused, a_machine_whose_id_looks_like_a_builders_lives_on;
    ps: they_are_told_with_numbers_directories_and_sockets, a_machine_that_does_not_run_has_none;
    reboot: an_exclusive_machine_waits_until_its_placement_is_confirmed;
    ready: the_last_stopped_has_the_place_and_a_request_finds_it_made, it_is_always_made_of_what_a_start_would_be,
        ends_of_agents_and_supervisors_leave_one_at_most, one_whose_root_is_kept_has_no_place,
        one_of_performance_cpus_gets_its_own_as_its_program_starts;
    rootfs: it_lasts_as_the_configuration_says, a_machine_has_the_size_and_the_directories_that_it_asks_for;
    sleep: it_stands_still_and_goes_on_where_it_was, it_sleeps_through_a_restart_of_the_agent,
        a_stop_and_a_new_version_end_it_and_it_stays_asleep, only_the_holder_of_a_lease_moves_its_machine,
        an_idle_machine_is_put_to_sleep_and_one_with_a_request_is_not, a_start_that_lacks_memory_ends_the_longest_sleeper,
        requests_wake_no_more_than_the_configuration_says, a_wait_says_when_it_is_in_vain, a_wait_begins_after_an_event;
    tombstones: many_that_nobody_asked_for_wait_for_an_operator;
    volumes: a_volume_outlives_its_machines_and_goes_with_its_tombstone,
        a_volume_survives_the_ends_of_agents_and_supervisors, a_full_volume_is_its_tenants_problem_and_grows,
        snapshots_are_restored_and_volumes_forked, lost_files_are_said_to_be_lost,
        what_is_to_be_encrypted_is_so_or_is_not_made, a_snapshot_is_made_each_day_and_is_what_it_was;
    life: a_signal_that_is_not_delivered_ends_nothing, a_machine_of_a_thousand_nested_directories_is_destroyed,
        a_server_that_opens_secrets_leaves_no_core_file;
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| dunlin_runtime::is_personality(argument)) {
        dunlin_runtime::supervisor_main();
    }
    // What these tests do to interfaces, routes, nftables and mounts stays in here.
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces; these tests need root");
    setup::own_resolv_conf();
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let mut failed = Vec::new();
    for (name, test) in TESTS {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let began = Instant::now();
        let ended = catch_unwind(test);
        println!("test {name} ... {} ({:.1?})", if ended.is_ok() { "ok" } else { "FAILED" }, began.elapsed());
        if ended.is_err() {
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failures: {failed:?}");
    ExitCode::FAILURE
}
