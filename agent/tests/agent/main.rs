//! The real agent, spoken to as the shim speaks to it: every case runs against an ordinary process,
//! and against PID 1 of a virtual machine, where cgroup limits exist too.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod carry_cases;
mod client;
mod container_cases;
mod guest;
mod io_cases;
mod kata_cases;
mod limit_cases;
mod network_cases;
mod process_cases;
mod sandbox_cases;

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Trial};

use client::Client;
use guest::Guest;

type Case = for<'a> fn(&'a Client<'a>) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Where a case can run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Anywhere.
    Nothing,
    /// Controllers of cgroup v2, or a machine of its own.
    Vm,
}

/// Lists cases by the names of their functions.
macro_rules! cases {
    ($($needs:ident $module:ident: $($name:ident)*;)*) => {
        vec![$($((stringify!($name), Needs::$needs,
            (|client| Box::pin($module::$name(client))) as Case),)*)*]
    };
}

fn cases() -> Vec<(&'static str, Needs, Case)> {
    cases! {
        Nothing container_cases:
            a_container_runs_in_namespaces_of_its_own
            a_missing_command_fails_create_with_the_words_of_runc
            a_command_that_cannot_be_executed_fails_start
            a_failed_create_leaves_nothing_behind
            what_the_kernel_shows_too_much_of_is_hidden
            a_read_only_root_cannot_be_written
            mounts_are_made_as_told
            a_symlink_of_the_image_cannot_lead_a_mount_outside
            a_tmpfs_can_begin_with_the_images_files
            the_usual_devices_are_there
            sysctls_and_hostname_are_set
            containers_can_share_a_pid_namespace
            a_container_can_join_the_pid_namespace_of_another
            a_user_namespace_maps_root_to_somebody
            a_missing_working_directory_is_made;
        Nothing process_cases:
            a_process_has_user_groups_and_capabilities_as_told
            no_new_privileges_and_seccomp_hold
            limits_and_oom_score_are_set
            mask_scheduling_and_personality_are_as_told
            home_comes_from_passwd
            nothing_of_the_agent_leaks_into_a_process
            an_exec_joins_the_container
            of_two_execs_with_one_id_one_runs
            an_exec_that_cannot_run_fails_at_once
            an_execs_exit_is_reported_to_those_who_wait_and_not_later
            a_term_without_a_handler_is_none_to_a_first_process
            a_term_with_a_handler_is_the_programs_business
            a_kill_ends_everything_in_the_container
            a_process_that_is_gone_cannot_be_signalled
            background_processes_die_with_the_first;
        Nothing io_cases:
            output_and_status_come_back
            a_large_stream_passes_unchanged
            output_written_just_before_exit_arrives
            the_status_does_not_wait_for_the_output
            a_reader_that_sleeps_blocks_nobody_else
            a_stream_that_was_not_opened_is_null
            stdio_can_be_polled
            a_terminal_behaves_like_one
            an_exec_can_have_a_terminal
            a_container_can_reopen_its_output;
        Nothing sandbox_cases:
            the_guest_tells_what_it_is
            calls_that_are_missing_say_so
            ids_must_be_names
            a_storage_can_be_shared_and_goes_with_its_last_user
            a_shared_storage_outlives_its_containers
            a_root_can_be_an_overlay_made_in_the_guest
            pausing_stops_and_resuming_goes_on
            stats_are_there_until_removal
            garbage_on_the_stdio_port_is_dropped
            nothing_is_left_of_many_processes;
        Nothing kata_cases:
            a_file_comes_in_pieces
            directories_and_links_are_copied
            a_copy_cannot_be_led_elsewhere_by_a_container
            a_copy_that_makes_no_sense_is_refused
            a_memory_volume_gets_another_size
            only_memory_volumes_get_another_size
            a_watched_volume_is_copied_when_it_changes
            what_has_no_versions_is_not_copied
            mounts_of_a_share_are_looked_up_again
            figures_are_text_for_prometheus;
        Nothing network_cases:
            an_interface_gets_its_name_and_addresses
            a_name_that_is_taken_is_swapped
            routes_and_neighbours_are_set
            wrong_network_requests_say_what_is_wrong
            volume_stats_are_those_of_the_file_system;
        Nothing carry_cases:
            a_port_of_a_container_can_be_reached
            nonsense_on_the_forward_port_is_dropped
            many_forwarded_connections_leave_nothing
            a_host_socket_is_reached_from_the_guest
            datagrams_are_carried_each_by_itself
            a_descriptor_that_is_passed_ends_the_connection
            a_host_that_refuses_closes_the_connection
            a_released_host_socket_is_gone;
        Vm sandbox_cases:
            the_clock_can_be_set
            the_clock_can_be_asked_and_corrected;
        Vm limit_cases:
            a_memory_limit_kills_and_the_event_comes_before_the_exit
            a_memory_limit_below_the_usage_ends_the_container
            unified_sets_what_the_cgroup_has_and_refuses_the_rest
            an_exec_joins_a_container_that_divided_its_cgroup
            limits_reach_the_kernel_and_can_be_changed
            a_disk_of_the_guest_cannot_be_opened
            a_disk_is_mounted_or_passed_on
            a_pids_limit_holds
            making_containers_and_processes_is_quick;
    }
}

/// Runs one case on a connection of its own.
fn run(guest: &Guest, case: Case) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = Client::connect(guest).await;
        case(&client).await;
    });
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    // One machine for all cases: it boots for a second or two. Cases use container ids of their
    // own.
    let vm: Arc<Mutex<Option<Guest>>> = Arc::default();
    for (name, needs, case) in cases() {
        if needs == Needs::Nothing {
            trials.push(Trial::test(format!("process::{name}"), move || {
                run(&Guest::process(), case);
                Ok(())
            }));
        }
        let vm = vm.clone();
        trials.push(Trial::test(format!("vm::{name}"), move || {
            let mut vm = sys::lock(&vm);
            run(vm.get_or_insert_with(Guest::vm), case);
            Ok(())
        }));
    }
    for (name, make) in [
        ("process", Guest::process as fn() -> Guest),
        ("vm", Guest::vm),
    ] {
        trials.push(Trial::test(
            format!("{name}::destroying_the_sandbox_ends_the_guest"),
            move || {
                let mut guest = make();
                run(&guest, |client| {
                    Box::pin(sandbox_cases::destroying_the_sandbox_is_answered(client))
                });
                let begun = std::time::Instant::now();
                assert!(guest.ends(), "the guest still runs\n{}", guest.console());
                eprintln!("gone {} ms after the answer", begun.elapsed().as_millis());
                Ok(())
            },
        ));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Some(guest) = sys::lock(&vm).take()
        && conclusion.has_failed()
    {
        eprintln!("{}", guest.console());
    }
    conclusion.exit_code()
}
