"""The command `moshi-c`.

Every command exits with 0 only on success: 1 is an error, in one line on stderr, 2 a wrong command
line, 130 an interrupt (Ctrl-C), after which what was written is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, bench, client
from .audio import AudioWriter, check_suffix, read_audio, read_blocks
from .chat import Chat
from .codec_file import CodecFile, read_codec_file, write_codec_file
from .convert import quantize
from .duet import duet
from .errors import AudioError, MoshiError
from .model import Model, devices, load, load_mimi
from .progress import Bar
from .recording import Recording
from .session import SPEAKING_FRAMES, Frame, Session
from .soundcard import device_of

Command = Callable[[argparse.Namespace], None]
NewCommand = Callable[..., argparse.ArgumentParser]  # name, what it runs, summary, example, options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"moshi-c: stopped{_kept(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read stdout has gone; the interpreter must not try to flush it again
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MoshiError, OSError, ValueError, MemoryError) as error:
        sentence = (
            getattr(error, "strerror", None) if not getattr(error, "filename", None) else None
        )
        message = " ".join((sentence or str(error)).split()) or type(error).__name__
        print(f"moshi-c: {message}", file=sys.stderr)
        return 1
    return 0


def _kept(arguments: argparse.Namespace) -> str:
    out = getattr(arguments, "output", None)
    return f"; {out} holds what was done by then" if out and Path(out).exists() else ""


# ---- commands ----------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> None:
    source, out = Path(arguments.input), Path(arguments.output)
    words_only = out.suffix.lower() == ".json"
    if words_only:
        _check_folder(out)
    else:
        check_suffix(out)
    if arguments.words:
        _check_folder(Path(arguments.words))
    _check_apart(source, out)
    with _load(arguments) as model, Session(model, seed=arguments.seed) as session:
        if not words_only and model._info["dep_q"] == 0:
            raise AudioError(f"{out}: this model has no voice; give an OUT ending in .json")
        pcm = read_audio(source, session.sample_rate)
        after = np.zeros(round(arguments.after * session.sample_rate), np.float32)
        pcm = np.concatenate([pcm, after])
        frames: list[Frame] = []
        with contextlib.ExitStack() as stack:
            writer = None
            if not words_only:
                writer = stack.enter_context(AudioWriter(out, session.output_sample_rate))
            for path in (out if words_only else None, arguments.words):
                if path:
                    stack.callback(_save_words, session, frames, Path(path))
            show = stack.enter_context(_shown_words())
            for frame in _conversation(session, pcm, arguments):
                if writer and frame.pcm is not None:
                    writer.write(frame.pcm)
                if arguments.text and frame.text:
                    show(frame.text)
                frames.append(replace(frame, pcm=None))  # the voice is in the file by now
        recording = session._recording(frames)
        if not arguments.text:
            print(recording.text.strip())
        _report(model, session, recording)


def _conversation(session: Session, pcm: Any, arguments: argparse.Namespace) -> Iterator[Frame]:
    """The frames of a whole input."""
    # a bar and words on the same terminal would overwrite each other
    shown = sys.stderr.isatty() and not (arguments.text and sys.stdout.isatty())
    size = session.frame_size
    with Bar(shown and not arguments.quiet, len(pcm) / session.sample_rate) as bar:
        for start in range(0, len(pcm), size):
            piece = pcm[start : start + size]
            yield from session.push(piece)
            bar.update(len(piece) / session.sample_rate)
        yield from session.flush()


def _save_words(session: Session, frames: list[Frame], path: Path) -> None:
    session._recording(frames)._save_words(path)


def _report(model: Model, session: Session, recording: Recording) -> None:
    """How fast it went and where the time went."""
    stats, parts = session.stats, model.stats
    seconds = stats.real_time_factor * recording.duration
    lines = [
        f"{recording.duration:.2f} s of sound in {seconds:.2f} s: "
        f"real-time factor {stats.real_time_factor:.3f}",
        f"a frame took {stats.p50_ms:.2f} ms (median), {stats.p99_ms:.2f} ms (99 of 100), "
        f"{stats.max_ms:.2f} ms (slowest); {stats.late} of {stats.frames} later than "
        f"{1000 / model.frame_rate:g} ms",
        "of these on average: "
        + ", ".join(
            f"{name} {parts[name + '_ms']:.2f}"
            for name in ("encode", "temporal", "depth", "decode", "other")
        )
        + " ms",
        f"seed {session.seed}",
    ]
    print("\n".join(lines), file=sys.stderr)


def _chat(arguments: argparse.Namespace) -> None:
    with (
        _load(arguments) as model,
        Session(model, seed=arguments.seed) as session,
        _shown_words() as said,
    ):
        chat = Chat(
            session,
            said,
            echo_gate=arguments.echo_gate,
            microphone=device_of(arguments.microphone),
            speaker=device_of(arguments.speaker),
        )

        def listening() -> None:
            print(f"listening; Ctrl-C ends it (seed {session.seed})", file=sys.stderr)

        try:
            chat.run(listening)
        finally:
            if chat.left_out:
                seconds = chat.left_out / model.frame_rate
                print(
                    f"{seconds:.1f} s of the microphone were left out: a step took "
                    f"{session.stats.p50_ms:.0f} ms of the {1000 / model.frame_rate:g} there are",
                    file=sys.stderr,
                )


def _client(arguments: argparse.Namespace) -> None:
    source = Path(arguments.input) if arguments.input else None
    target = Path(arguments.output) if arguments.output else None
    if target:
        check_suffix(target)
    if source and target:
        _check_apart(source, target)
    call = client.Call(
        arguments.url,
        source,
        target,
        after=arguments.after,
        token=arguments.token,
        seed=arguments.seed,
        verify=not arguments.insecure,
        echo_gate=arguments.echo_gate,
        microphone=device_of(arguments.microphone),
        speaker=device_of(arguments.speaker),
    )

    def waiting(place: int) -> None:
        print(f"waiting; place {place} in the line", file=sys.stderr)

    with _shown_words() as said:
        counts = client.talk(call, said, waiting)
    said_seconds, heard_seconds = counts.sent / client.RATE, counts.heard / client.RATE
    print(f"{said_seconds:.2f} s said, {heard_seconds:.2f} s heard", file=sys.stderr)


@contextlib.contextmanager
def _shown_words() -> Iterator[Callable[[str], None]]:
    """Prints text as it comes, on a line of its own."""
    line = False

    def said(text: str) -> None:
        nonlocal line
        print(text if line else text.lstrip(), end="", flush=True)
        line = True

    try:
        yield said
    finally:
        if line:
            print(flush=True)


def _duet(arguments: argparse.Namespace) -> None:
    out = Path(arguments.output)
    check_suffix(out)
    for source in arguments.first:
        _check_apart(Path(source), out)
    seeds = [arguments.seed, arguments.seed]
    if arguments.seed is not None:
        seeds[1] = (arguments.seed + 1) % 2**64
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_load(arguments, max_sessions=2))
        questions = [read_audio(path, model.sample_rate) for path in arguments.first]
        left, right = (stack.enter_context(Session(model, seed=seed)) for seed in seeds)
        talk = duet(left, right, questions)
        first = next(talk)  # what is wrong with the model is said before there is a file
        writer = stack.enter_context(AudioWriter(out, model.sample_rate, channels=2))
        speaker, until = None, 0

        def end_line() -> None:
            if speaker:
                print(flush=True)

        stack.callback(end_line)
        frames = round(arguments.seconds * model.frame_rate)
        for a, b, sound in itertools.islice(itertools.chain([first], talk), frames):
            writer.write(sound)
            for name, frame in (("left", a), ("right", b)):
                if not frame.text:
                    continue
                if name != speaker or frame.index > until:
                    end_line()
                    print(f"{frame.time:6.2f} s  {name:<5} ", end="")
                print(frame.text, end="", flush=True)
                speaker, until = name, frame.index + SPEAKING_FRAMES
    print(
        f"{out}: {frames / model.frame_rate:.2f} s, seeds {left.seed} and {right.seed}",
        file=sys.stderr,
    )


def _encode(arguments: argparse.Namespace) -> None:
    source, out = Path(arguments.input), Path(arguments.output)
    _check_mimi_suffix(out)
    _check_folder(out)
    _check_apart(source, out)
    with load_mimi(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        codebooks=arguments.codebooks,
    ) as mimi:
        codes, samples = mimi._encode_blocks(read_blocks(source, mimi.sample_rate))
        file = CodecFile(codes, mimi.codebook_size, samples, mimi.sample_rate, mimi.frame_size)
        write_codec_file(out, file)
    print(
        f"{out}: {codes.shape[1]} frames of {codes.shape[0]} codes, "
        f"{samples / file.sample_rate:.2f} s",
        file=sys.stderr,
    )


def _decode(arguments: argparse.Namespace) -> None:
    source, out = Path(arguments.input), Path(arguments.output)
    check_suffix(out)
    _check_apart(source, out)
    file = read_codec_file(source)
    with load_mimi(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        codebooks=len(file.codes),
    ) as mimi:
        for what, found, expected in (
            ("entries in a codebook", file.codebook_size, mimi.codebook_size),
            ("Hz", file.sample_rate, mimi.sample_rate),
            ("samples in a frame", file.frame_size, mimi.frame_size),
        ):
            if found != expected:
                raise AudioError(
                    f"{source} has {found} {what}, the codec has {expected}: "
                    "give the codec that made it with --model"
                )
        left = file.samples
        with AudioWriter(out, mimi.sample_rate) as writer:
            for pcm in mimi._decode_pieces(file.codes):
                writer.write(pcm[:left])
                left -= min(len(pcm), left)
    print(f"{out}: {file.samples / file.sample_rate:.2f} s", file=sys.stderr)


def _quantize(arguments: argparse.Namespace) -> None:
    target = quantize(
        arguments.source,
        arguments.target,
        "q4" if arguments.dtype == "auto" else arguments.dtype,
        threads=arguments.threads,
        progress=sys.stderr.isatty(),
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {_bytes(size)}", file=sys.stderr)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.json:
        _check_folder(Path(arguments.json))
    with _load(arguments, max_sessions=max(bench.SESSIONS)) as model:
        if not model._info["has_mimi"]:
            raise ValueError(f"{model._source} has no codec; expected a model that hears")

        def shown(what: str) -> None:
            if sys.stderr.isatty():
                print(f"measuring: {what}", file=sys.stderr)

        report = bench.run(model, frames=arguments.frames, threads=arguments.threads, shown=shown)
    print(bench.text(report))
    if arguments.json:
        bench.write(report, Path(arguments.json))


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from . import server
    except ImportError as error:
        raise ValueError(str(error)) from error
    settings = server.Settings(
        host=arguments.host,
        port=arguments.port,
        seed=arguments.seed,
        queue=arguments.queue,
        token=arguments.token,
        tls=tuple(arguments.tls) if arguments.tls else None,
        insecure=arguments.insecure,
        origins=tuple(arguments.origin),
        public_url=arguments.public_url,
        twilio_token=arguments.twilio_token,
        dtx=arguments.dtx,
        max_seconds=arguments.max_seconds,
        idle_seconds=arguments.idle_seconds,
        drain_seconds=arguments.drain_seconds,
        per_address=arguments.per_address,
    )
    with server.logging_to_stderr(), _load(arguments, max_sessions=arguments.sessions) as model:
        server.serve(model, settings)


def _info(arguments: argparse.Namespace) -> None:
    rows: list[tuple[str, str]] = [("moshi_c", __version__)]
    rows.append(("Python", f"{platform.python_version()} on {platform.platform()}"))
    for name in ("numpy", "sentencepiece", "huggingface_hub", "soundfile", "soxr"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            rows.append((name, metadata.version(name)))
    for device in devices():
        state = f", {_bytes(device.memory)}" if device.memory else ""
        state += "" if device.usable else f"; not usable: {device.reason}"
        rows.append((device.name, device.description + state))
    _print_rows(rows)
    with _load(arguments) as model:
        print()
        _print_rows(list(_facts(model)))


def _facts(model: Model) -> Iterator[tuple[str, str]]:
    info, memory = model._info, model.memory
    yield "model", model._source
    yield "family", model.family
    yield "parameters", f"{info['parameters']:,} with the codec"
    yield (
        "weights",
        f"{model.dtype}, {_bytes(memory.weights)}, {_bytes(info['mapped_bytes'])} mapped",
    )
    yield "device", f"{model.device}, {_bytes(memory.free)} free"
    yield "a session", _bytes(memory.session)
    yield "sound", f"{model.sample_rate} Hz, {model.frame_rate:g} frames a second"
    yield "streams", f"{info['dep_q']} of the model, {info['user_q']} of the user"
    seconds = f"{info['context'] / model.frame_rate:.0f} s"
    yield "context", f"{info['context']} frames, {seconds}"
    yield "first output", f"after {model.max_delay} frames"
    yield (
        "sampling",
        f"text {info['text_temperature']:g} of {info['text_top_k']}, "
        f"audio {info['audio_temperature']:g} of {info['audio_top_k']}",
    )
    if model.tokenizer:
        yield "tokenizer", f"{model.tokenizer.vocab_size} pieces, {model.tokenizer.path}"
    for key in ("lm_path", "mimi_path", "config_path"):
        yield key.removesuffix("_path"), info[key] or "none"
    if model._core.conditions:
        for name, values in model._core.conditions.items():
            yield f"condition {name}", ", ".join(values) or "any value"


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---- shared ------------------------------------------------------------------------------------


def _load(arguments: argparse.Namespace, max_sessions: int = 1) -> Model:
    return load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        max_sessions=max_sessions,
        progress=sys.stderr.isatty(),
    )


def _check_folder(path: Path) -> None:
    if path.is_dir():
        raise AudioError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise AudioError(f"{path} cannot be written: there is no folder {path.parent}")


def _check_mimi_suffix(path: Path) -> None:
    if path.suffix.lower() != ".mimi":
        raise AudioError(f"{path} has the suffix {path.suffix!r}; expected .mimi")


def _check_apart(source: Path, out: Path) -> None:
    if source.exists() and out.exists() and source.samefile(out):
        raise AudioError(f"{out} is the input; give another OUT")


# ---- command line ------------------------------------------------------------------------------


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**64 - 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 86400 s")
    return value


def _common(*names: str, dtypes: str | None = None) -> argparse.ArgumentParser:
    """The options of every command, or these of them; `dtypes` says which formats will do."""
    options: dict[str, dict[str, Any]] = {
        "model": {
            "metavar": "M",
            "help": "folder, weight file or hub id (default: the small model in the package)",
        },
        "device": {
            "default": "auto",
            "metavar": "D",
            "help": "cpu, cuda, cuda:1 (default: MOSHI_C_DEVICE, or a card if one can hold it)",
        },
        "dtype": {
            "default": "auto",
            "metavar": "T",
            "help": dtypes or "auto (as stored), f32, f16, bf16, fp8, int8, q8 or q4",
        },
        "seed": {
            "type": _seed,
            "metavar": "N",
            "help": "of what is drawn at random (default: a random one)",
        },
        "threads": {
            "type": _count,
            "metavar": "N",
            "help": "default: MOSHI_C_THREADS, or one per core",
        },
    }
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("options of every command" if not names else "options")
    for name in names or options:
        group.add_argument(f"--{name}", **options[name])
    return common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moshi-c",
        description="Full-duplex speech models of the Moshi family.",
        epilog="example: moshi-c run question.wav answer.wav",
    )
    parser.add_argument("--version", action="version", version=f"moshi-c {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = _common()

    def command(
        name: str,
        run: Command,
        summary: str,
        example: str,
        options: argparse.ArgumentParser = common,
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            parents=[options],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {example}",
        )
        sub.set_defaults(command=run)
        return sub

    for add in (
        _add_run,
        _add_duet,
        _add_calls,
        _add_codec,
        _add_quantize,
        _add_serve,
        _add_figures,
    ):
        add(command)
    return parser


def _add_run(command: NewCommand) -> None:
    run = command(
        "run",
        _run,
        "one conversation over a recording",
        "moshi-c run question.wav answer.wav --text --after 3 --seed 7",
    )
    run.add_argument("input", metavar="IN", help="what the user says: WAV, FLAC, OGG, MP3 or AIFF")
    run.add_argument(
        "output",
        metavar="OUT",
        help="what the model says: .wav, .flac, .ogg, .opus, .mp3, .aiff, or .json for timed words",
    )
    run.add_argument(
        "--text", action="store_true", help="print the text as it comes, instead of at the end"
    )
    run.add_argument(
        "--after",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="seconds of silence after the recording, for an answer to its end (default: 0)",
    )
    run.add_argument("--words", metavar="FILE.json", help="write text and timed words too")
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_duet(command: NewCommand) -> None:
    talk = command(
        "duet",
        _duet,
        "two models that talk to each other, written to a stereo file",
        "moshi-c duet duet.wav --seconds 60 --first question.wav --seed 7",
    )
    talk.add_argument(
        "output", metavar="OUT", help="a side on each channel: .wav, .flac, .ogg, .opus, .mp3 ..."
    )
    talk.add_argument(
        "--seconds", type=_seconds, default=30.0, metavar="S", help="how long (default: 30)"
    )
    talk.add_argument(
        "--first",
        nargs="+",
        default=[],
        metavar="IN",
        help="said first in the left one's place; a further file each time both fall silent",
    )


def _add_calls(command: NewCommand) -> None:
    chat = command(
        "chat",
        _chat,
        "a conversation by microphone and loudspeaker",
        "moshi-c chat --no-echo-gate",
    )
    call = command(
        "client",
        _client,
        "a call to a server of Moshi's WebSocket protocol",
        "moshi-c client ws://localhost:8998 --in question.wav --out answer.wav --after 3",
        _common("seed"),  # the server has the model
    )
    call.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        default="ws://localhost:8998",
        help="ws://, wss://, http:// or https://; /api/chat (default: ws://localhost:8998)",
    )
    call.add_argument(
        "--in", dest="input", metavar="FILE", help="said in real time (default: the microphone)"
    )
    call.add_argument(
        "--out", dest="output", metavar="FILE", help="for the answer (default: the loudspeaker)"
    )
    call.add_argument(
        "--after",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="seconds of silence after the file, for an answer to its end (default: 0)",
    )
    call.add_argument("--token", metavar="T", help="what the server wants its callers to know")
    call.add_argument(
        "--insecure", action="store_true", help="take any certificate, as self-signed ones"
    )
    for sub in (chat, call):
        sub.add_argument(
            "--no-echo-gate",
            dest="echo_gate",
            action="store_false",
            help="with headphones: the microphone stays open while the model is heard",
        )
        sub.add_argument("--microphone", metavar="D", help="number, or part of the name")
        sub.add_argument("--speaker", metavar="D", help="number, or part of the name")


def _add_codec(command: NewCommand) -> None:
    codec = _common(dtypes="auto (f32), f32, bf16 or int8")
    encode = command(
        "encode",
        _encode,
        "sound to the codes of the codec",
        "moshi-c encode speech.wav speech.mimi",
        codec,
    )
    encode.add_argument("input", metavar="IN", help="WAV, FLAC, OGG, MP3 or AIFF")
    encode.add_argument("output", metavar="OUT.mimi", help="the codes")
    encode.add_argument(
        "--codebooks", type=_count, default=8, metavar="K", help="codes of a frame (default: 8)"
    )

    decode = command(
        "decode",
        _decode,
        "codes of the codec to sound",
        "moshi-c decode speech.mimi again.wav",
        codec,
    )
    decode.add_argument("input", metavar="IN.mimi", help="the codes")
    decode.add_argument("output", metavar="OUT", help=".wav, .flac, .ogg, .opus, .mp3 or .aiff")


def _add_quantize(command: NewCommand) -> None:
    convert = command(
        "quantize",
        _quantize,
        "a checkpoint in another weight format, as a folder that opens at once",
        "moshi-c quantize kyutai/moshiko-pytorch-bf16 moshiko-q4 --dtype q4",
        _common("dtype", "threads", dtypes="q4 (default), q8, int8, fp8 or bf16"),
    )
    convert.add_argument("source", metavar="SOURCE", help="folder, weight file or hub id")
    convert.add_argument(
        "target",
        metavar="TARGET",
        help="a new folder",
    )


def _add_serve(command: NewCommand) -> None:
    serve = command(
        "serve",
        _serve,
        "a page to talk to the model, and WebSockets: Moshi's, OpenAI's, Twilio's, plain samples",
        "moshi-c serve --sessions 4",
    )
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help="default: 127.0.0.1")
    serve.add_argument("--port", type=int, default=8998, metavar="N", help="default: 8998")
    serve.add_argument(
        "--sessions", type=_count, default=8, metavar="N", help="callers at once (default: 8)"
    )
    serve.add_argument(
        "--queue", type=int, default=8, metavar="N", help="callers who may wait (default: 8)"
    )
    serve.add_argument(
        "--token",
        metavar="T",
        help="what callers must know, 8 characters or more: Authorization: Bearer T, or ?token=T",
    )
    serve.add_argument(
        "--tls", nargs=2, metavar=("CERT", "KEY"), help="two PEM files; for https and wss"
    )
    serve.add_argument(
        "--insecure", action="store_true", help="let others reach it without a token"
    )
    serve.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page of another host that may connect; may be given again",
    )
    serve.add_argument(
        "--public-url",
        default=os.environ.get("MOSHI_C_PUBLIC_URL") or None,
        metavar="URL",
        help="where others reach this server, such as https://example.org "
        "(default: MOSHI_C_PUBLIC_URL)",
    )
    serve.add_argument(
        "--twilio-token",
        default=os.environ.get("MOSHI_C_TWILIO_TOKEN") or None,
        metavar="T",
        help="auth token of the Twilio account whose telephone calls come in; needs --public-url "
        "(default: MOSHI_C_TWILIO_TOKEN)",
    )
    serve.add_argument(
        "--dtx", action="store_true", help="send nothing on /api/chat while the model is silent"
    )
    for name, seconds, what in (
        ("max", 3600, "a call lasts at most; 0 for ever"),
        ("idle", 60, "a call ends after so long without sound from the caller; 0 never"),
        ("drain", 10, "calls may go on after SIGTERM"),
    ):
        serve.add_argument(
            f"--{name}-seconds",
            type=_seconds,
            default=float(seconds),
            metavar="S",
            help=f"{what} (default: {seconds})",
        )
    serve.add_argument(
        "--per-address",
        type=int,
        default=16,
        metavar="N",
        help="calls from one address at once, and four connections for each; "
        "0, as behind a proxy, is no bound (default: 16)",
    )


def _add_figures(command: NewCommand) -> None:
    info = command(
        "info",
        _info,
        "what is installed, and what a model is",
        "moshi-c info kyutai/moshiko-pytorch-bf16",
    )
    measure = command(
        "bench",
        _bench,
        "what this machine can do, and what a model makes of it",
        "moshi-c bench --dtype q8 --json bench.json",
    )
    measure.add_argument(
        "--frames", type=_count, default=100, metavar="N", help="steps measured (default: 100)"
    )
    measure.add_argument("--json", metavar="FILE", help="write the figures too")
    for sub in (info, measure):
        # SUPPRESS: without it the absent argument would overwrite --model
        sub.add_argument(
            "model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="as --model"
        )
