//! The `fairvault` binary: arguments in, engine, output and exit code out.
//!
//! Exit codes are a promise (see `docs/exit-codes.md`). `wal get` has its own: PostgreSQL reads 1 to 125 as
//! "not in the archive" and ends recovery, so every failure there, from a typo to a panic, is 200.

mod args;
mod away;
mod commands;
mod config;
mod context;
mod memory;
mod noted;
mod output;
mod repository;
mod schedule;
mod time;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;
use fairvault_engine::env::{Env as _, SystemEnv};
use fairvault_engine::error::{Error, Kind, Result};
use tokio::runtime::{Builder, Runtime};

use args::{Cli, Command, Global, LogFormat, WalCommand};
use commands::Outcome;
use context::Context;

/// Which table of exit codes applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Ordinary,
    WalPush,
    WalGet,
    /// A background worker: its result is in its spool folder. It may become a child of PostgreSQL itself (as
    /// the first process of a container), which takes any other end than 0 for a crash of its own.
    Worker,
}

/// Last argument of a background worker.
const WORKER: &str = "--worker";

/// Done, with warnings that need a person.
const WARNINGS: u8 = 6;
/// Try again.
const TEMPORARY: u8 = 75;
/// `wal get`: stop recovery.
const STOP_RECOVERY: u8 = 200;
/// Exit code of an interrupted run.
const INTERRUPTED: u8 = 130;

/// The table by the raw arguments, for as long as they are not understood.
fn table(arguments: &[String]) -> Table {
    // Values of options and names of stanzas may look like verbs. Where there is doubt, the strictest table
    // rules: what it costs to be wrong is a recovery that ends early.
    if arguments.last().is_some_and(|word| word == WORKER) {
        return Table::Worker;
    }
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let mut found = Table::Ordinary;
    for (at, word) in words.iter().enumerate() {
        let verb = match *word {
            "wal" => words[at..].iter().find(|w| ["get", "push"].contains(w)).copied(),
            "archive-get" => Some("get"),
            "archive-push" => Some("push"),
            _ => None,
        };
        match verb {
            Some("get") => return Table::WalGet,
            Some(_) => found = Table::WalPush,
            None => {}
        }
    }
    found
}

/// The table of a command that was understood.
fn table_of(command: &Command) -> Table {
    match command {
        Command::Wal(WalCommand::Get(args)) | Command::ArchiveGet(args) if args.worker => Table::Worker,
        Command::Wal(WalCommand::Push(args)) | Command::ArchivePush(args) if args.worker => Table::Worker,
        Command::Wal(WalCommand::Push(args)) if args.serve => Table::Ordinary,
        Command::Wal(WalCommand::Get(_)) | Command::ArchiveGet(_) => Table::WalGet,
        Command::Wal(WalCommand::Push(_)) | Command::ArchivePush(_) => Table::WalPush,
        _ => Table::Ordinary,
    }
}

/// A command of PostgreSQL's, that moves WAL and needs no server.
fn moves_wal(command: &Command) -> bool {
    matches!(
        command,
        Command::Wal(WalCommand::Get(_) | WalCommand::Push(_)) | Command::ArchiveGet(_) | Command::ArchivePush(_)
    )
}

/// The table of the command, once that is understood.
static UNDERSTOOD: std::sync::OnceLock<Table> = std::sync::OnceLock::new();

/// The command has ended, and what came of it is known.
static ENDED: AtomicBool = AtomicBool::new(false);

fn exit_code(table: Table, error: &Error) -> u8 {
    match (table, error.kind()) {
        (Table::Worker, _) => 0,
        (Table::WalGet, _) => wal_get_failure(),
        (Table::WalPush, Kind::Temporary | Kind::Interrupted) => TEMPORARY,
        (Table::WalPush, _) => 1,
        (Table::Ordinary, kind) => match kind {
            Kind::Usage => 2,
            Kind::NotFound => 3,
            Kind::Damaged => 4,
            Kind::Held => 5,
            Kind::Temporary => TEMPORARY,
            Kind::Interrupted => INTERRUPTED,
            _ => 1,
        },
    }
}

/// A standby would be shut down by a code above 125: there, doubt is "try again later".
fn wal_get_failure() -> u8 {
    if std::path::Path::new("standby.signal").exists() {
        TEMPORARY
    } else {
        STOP_RECOVERY
    }
}

fn failure_code(table: Table, ordinary: u8) -> u8 {
    match table {
        Table::Worker => 0,
        Table::WalGet => wal_get_failure(),
        Table::WalPush => 1,
        Table::Ordinary => ordinary,
    }
}

/// A core dump would hold keys, and pages of the cluster.
fn forbid_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // Where that is not allowed, nothing else is wrong.
    let _ = setrlimit(Resource::Core, none);
}

fn main() -> ExitCode {
    forbid_core_dumps();
    let arguments: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let table = table(&arguments);
    let default_hook = std::panic::take_hook();
    let main_thread = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        // Nobody waits any more for a thread on which a store hung. When that answers, the thread finds its runtime gone,
        // and panics: what came of the command stands.
        if ENDED.load(Ordering::SeqCst) && std::thread::current().id() != main_thread {
            return;
        }
        default_hook(info);
        // Whatever thread it was: a process in doubt ends, and with the right code.
        let table = UNDERSTOOD.get().copied().unwrap_or(table);
        std::process::exit(failure_code(table, 1).into());
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            let asked_for_help = error.exit_code() == 0;
            return ExitCode::from(if asked_for_help { 0 } else { failure_code(table, 2) });
        }
    };
    let table = *UNDERSTOOD.get_or_init(|| table_of(&cli.command));
    start_log(&cli.global);
    if matches!(
        cli.command,
        Command::Wal(WalCommand::Receive(_)) | Command::Restore(_) | Command::Verify { .. } | Command::Repair(_)
    ) {
        memory::give_back();
    }
    if matches!(cli.command, Command::Wal(WalCommand::Receive(_))) {
        memory::share();
    }
    let output = cli.global.output;
    let runtime = match runtime(table) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("fairvault: starting: {error}");
            return ExitCode::from(failure_code(table, 1));
        }
    };
    let result = runtime.block_on(run(cli));
    ENDED.store(true, Ordering::SeqCst);
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Warnings) => ExitCode::from(WARNINGS),
        Ok(Outcome::Absent) => ExitCode::from(1),
        Ok(Outcome::DamageFound) => ExitCode::from(4),
        Ok(Outcome::Held) => ExitCode::from(5),
        Err(error) => {
            output::error(&error, output);
            ExitCode::from(exit_code(table, &error))
        }
    }
}

/// What fetches one file has one thread for its few requests: handing every part of an answer from thread to thread would
/// take longer than reading it. What takes long is done by others anyway.
fn runtime(table: Table) -> std::io::Result<Runtime> {
    match table {
        Table::WalGet => Builder::new_current_thread(),
        Table::WalPush | Table::Worker => threads(2),
        Table::Ordinary => threads(std::thread::available_parallelism().map_or(2, usize::from)),
    }
    .enable_all()
    .build()
}

fn threads(number: usize) -> Builder {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(number);
    builder
}

fn start_log(global: &Global) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_new(format!(
        "{},object_store=warn,hyper=warn,reqwest=warn,rustls=warn",
        global.log_level
    ))
    .unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let _ = match global.log_format {
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .try_init(),
        LogFormat::Text => builder.without_time().with_target(false).with_ansi(false).try_init(),
    };
}

async fn run(cli: Cli) -> Result<Outcome> {
    let context = Arc::new(Context::load(cli.global, moves_wal(&cli.command))?);
    let (what, began_us) = (noted::what(&cli.command), SystemEnv.now_us());
    let result = carry_out(&context, cli.command).await;
    // What comes now changes nothing of it.
    ENDED.store(true, Ordering::SeqCst);
    if let Some(what) = what {
        noted::note(&context, what, began_us, &result).await;
    }
    result
}

async fn carry_out(context: &Arc<Context>, command: Command) -> Result<Outcome> {
    match command {
        Command::Stanza(args::StanzaCommand::Create(args)) | Command::StanzaCreate(args) => {
            commands::stanza::create(context, args).await
        }
        Command::Stanza(args::StanzaCommand::Upgrade(args)) => commands::stanza::upgrade(context, args).await,
        Command::Stanza(args::StanzaCommand::Fence(args)) => commands::stanza::fence(context, args).await,
        Command::Stanza(args::StanzaCommand::Distrust(args)) => commands::stanza::distrust(context, args).await,
        Command::Stanza(args::StanzaCommand::List) => commands::stanza::list(context).await,
        Command::Check { stanza } => commands::check::run(context, &stanza).await,
        Command::Backup(args) => commands::backup::run(context, args).await,
        Command::Restore(args) => commands::restore::run(context, args).await,
        Command::Wal(WalCommand::Push(args)) | Command::ArchivePush(args) => {
            commands::wal::push::run(context.clone(), args).await
        }
        Command::Wal(WalCommand::Get(args)) | Command::ArchiveGet(args) => {
            commands::wal::get::run(context.clone(), args).await
        }
        Command::Wal(WalCommand::Receive(args)) => commands::wal::receive::run(context, args).await,
        Command::Info { stanza } => commands::info::run(context, stanza).await,
        Command::Verify {
            stanza,
            level,
            progress,
        } => commands::verify::run(context, &stanza, level, progress).await,
        Command::Copy(args) => commands::copy::run(context.clone(), args).await,
        Command::Repair(args) => commands::repair::run(context, args).await,
        Command::Expire(args) => commands::expire::run(context, args).await,
        Command::Gc(args) => commands::gc::run(context, args).await,
        Command::Lock(args) => commands::lock::run(context, args).await,
        Command::Hold { stanza, backup, reason } => {
            commands::expire::hold(context, &stanza, &backup, &reason, false).await
        }
        Command::Unhold { stanza, backup, reason } => {
            commands::expire::hold(context, &stanza, &backup, &reason, true).await
        }
        Command::Audit { stanza } => commands::audit::run(context, &stanza).await,
        Command::Policy(args) => commands::expire::policy(context, args).await,
        Command::Key(command) => commands::key::run(context, command).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_found_whatever_else_is_wrong() {
        let of = |line: &str| table(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(of("fairvault --conifg x wal get acme"), Table::WalGet);
        assert_eq!(of("fairvault archive-get"), Table::WalGet);
        assert_eq!(of("fairvault wal push acme x --worker"), Table::Worker);
        assert_eq!(of("fairvault wal --repo-url file:///x push"), Table::WalPush);
        assert_eq!(of("fairvault backup wal"), Table::Ordinary);
        assert_eq!(of("fairvault verify get"), Table::Ordinary);
        assert_eq!(of("fairvault --repo backup wal get acme x y"), Table::WalGet);
        assert_eq!(of("fairvault --log-level info wal get acme x y"), Table::WalGet);
        assert_eq!(of("fairvault --repo wal wal get acme"), Table::WalGet);
        let understood = |line: &str| table_of(&Cli::parse_from(line.split(' ')).command);
        assert_eq!(understood("fairvault --repo get wal push get x"), Table::WalPush);
        assert_eq!(understood("fairvault wal get push x y"), Table::WalGet);
        assert_eq!(understood("fairvault verify wal"), Table::Ordinary);
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
