//! `kvctl`: the operator's and the developer's tool for the cache.
//!
//! What concerns a running daemon goes over its admin socket ([`client`]); traces need none ([`trace`]).

mod client;
mod compact;
mod config;
mod conversations;
mod explain;
mod status;
mod table;
mod top;
mod trace;
mod transfers;
mod verify;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use client::Client;

/// Look into the KV cache, and change what it keeps.
///
/// All but `replay`, `generate` and `convert` ask a running daemon, so they run where its admin socket is:
/// `kubectl exec POD -c cache-daemon -- /colloquy/kvctl status`.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Kvctl {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Options {
    /// The daemon's admin socket.
    #[arg(
        long,
        global = true,
        env = "COLLOQUY_ADMIN_SOCKET",
        default_value = "/run/kv/admin.sock",
        value_name = "PATH"
    )]
    socket: std::path::PathBuf,
    /// JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How the tiers, the disk and the moves between them are.
    Status,
    /// The conversations that take the most.
    Top(top::Top),
    /// One conversation: its tokens, its blocks, where they are.
    Show(conversations::Which),
    /// Why a conversation's history was computed again: the first token that differs, or the first block lost.
    Explain(explain::Explain),
    /// Give a conversation a second name under which it goes on by itself.
    Fork(conversations::Fork),
    /// Drop blocks from the start of a conversation's history.
    Truncate(conversations::Truncate),
    /// Forget a conversation: unreadable at once, erased from disk within the deadline.
    Delete(conversations::Delete),
    /// Get a conversation from another daemon, or from the object store.
    Import(transfers::Import),
    /// Put a conversation into the object store.
    Offload(conversations::Which),
    /// Read every stored block and check it, without getting in the way.
    Verify(verify::Verify),
    /// The settings in force, and change some of them while the daemon runs.
    Config(config::Config),
    /// Give room that the disk tier does not need back to the file system.
    Compact,
    /// Show what a cache of these sizes would have had of a trace's history, under one policy or all.
    Replay(trace::Replay),
    /// Draw a trace from a table of lengths (docs/trace-format.md).
    Generate(trace::Generate),
    /// Make a trace out of somebody else's recording.
    #[command(subcommand)]
    Convert(trace::Convert),
}

fn main() -> ExitCode {
    let Kvctl { options, command } = Kvctl::parse();
    let (client, json) = (Client::new(options.socket), options.json);
    let result = match command {
        Command::Status => status::run(&client, json),
        Command::Top(top) => top.run(&client, json),
        Command::Show(which) => which.show(&client, json),
        Command::Explain(explain) => explain.run(&client, json),
        Command::Fork(fork) => fork.run(&client, json),
        Command::Truncate(truncate) => truncate.run(&client, json),
        Command::Delete(delete) => delete.run(&client, json),
        Command::Import(import) => import.run(&client, json),
        Command::Offload(which) => transfers::offload(&which, &client, json),
        Command::Verify(verify) => verify.run(&client, json),
        Command::Config(config) => config.run(&client, json),
        Command::Compact => compact::run(&client, json),
        Command::Replay(replay) => replay.run(json),
        Command::Generate(generate) => generate.run(),
        Command::Convert(convert) => convert.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}
