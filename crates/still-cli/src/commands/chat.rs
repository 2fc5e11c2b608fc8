//! `still chat`: turns with the model's own template; the attention state is kept between them.

use std::io::{BufRead, IsTerminal};

use anyhow::Context;
use still_attention::RowDtype;
use still_model::{ChatSession, GenerateOptions};

use super::generate::summary;
use super::{load, row_dtype, sampling, stream_to};
use crate::args::ChatArgs;
use crate::interrupt;
use crate::printer::Printer;

/// Runs the command.
pub fn run(args: &ChatArgs, printer: &Printer) -> anyhow::Result<()> {
    let options = sampling(&args.sampling)?;
    let model = load(&args.model.model, &args.device, printer)?;
    let rows = row_dtype(args.sampling.cache_dtype, RowDtype::Bf16, &model);
    let mut session = ChatSession::new(model, rows, args.system.as_deref())?;
    interrupt::catch()?;
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal();
    if terminal {
        printer.note("Ctrl-C cuts a reply short; /exit or Ctrl-D ends the chat");
    }
    loop {
        if terminal {
            printer.ask("> ");
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line).context("cannot read standard input")? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            message => turn(&mut session, message, &options, printer)?,
        }
    }
}

fn turn(
    session: &mut ChatSession,
    message: &str,
    options: &GenerateOptions,
    printer: &Printer,
) -> anyhow::Result<()> {
    interrupt::take();
    let mut written = Ok(());
    let reply = session.send(message, options, &mut stream_to(printer, true, &mut written))?;
    written?;
    printer.stream("\n")?;
    if reply.reread {
        printer.warn("the chat template rewrote earlier turns, so they were read again");
    }
    if let Some(warning) = &reply.generation.warning {
        printer.warn(warning);
    }
    printer.note(summary(&reply.generation, reply.read, session.cache_bytes()));
    Ok(())
}
