//! The runtime's process: settings, log, exit code. What it does is in [`runtime::server`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use runtime::config::{Arguments, Config};
use runtime::{server, telemetry};

/// Bad settings, as in BSD's `sysexits.h`.
const EXIT_CONFIG: u8 = 64;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // `--help` and `--version` come here too, and are no error.
            let code = if error.use_stderr() { EXIT_CONFIG } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let (format, filter) = arguments.log();
    if let Err(error) = telemetry::start(format, filter) {
        return fail(&error, EXIT_CONFIG);
    }
    let config = match Config::try_from(arguments) {
        Ok(config) => config,
        Err(error) => return fail(&error, EXIT_CONFIG),
    };
    match server::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, error.exit_code()),
    }
}

/// Says why in one sentence, whatever the log's form and filter are.
fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    let sentence = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    eprintln!("runtime: {sentence}");
    ExitCode::from(code)
}
