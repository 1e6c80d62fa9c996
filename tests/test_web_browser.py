"""The web page in a real browser: type, see the answer stream, stop it, ask again, vote."""

import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import MakeModel
from scripted_server import HOSTILE, ScriptedServer
from serving import save
from transformers import PreTrainedTokenizerBase
from web_site import Site
from webdriver import MISSING, Browser

from mini_qwen.votes import read_votes

for package in ("gradio", "openai", "choix"):
    pytest.importorskip(package, reason=f"{package} is not installed")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

PASSWORD = "open sesame"


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def sites(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    scripted: ScriptedServer,
) -> Iterator[dict[str, Site]]:
    """Two pages, in English and in Chinese, that start at the same time."""
    folder = tmp_path_factory.mktemp("web")
    for stage in ("sft", "pt"):  # untrained: they go on for as long as they may
        save(folder / stage, tiny_model(stage=stage, max_position_embeddings=8192), tokenizer)
    gone = ScriptedServer()
    gone.close()
    models = ["sft", "pt", f"{scripted.url}#echo", f"{gone.url}#gone"]
    remote = [f"{scripted.url}#{model}" for model in ("hostile", "endless")]
    both = {
        "en": Site(folder / "en", models, "--language", "en"),
        "zh": Site(folder / "zh", remote, LC_ALL="zh_CN.UTF-8", MINI_QWEN_WEB_PASSWORD=PASSWORD),
    }
    yield both
    for site in both.values():
        site.end()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"), width=1240, height=1000)
    yield browser
    browser.close()


@pytest.fixture
def english(sites: dict[str, Site], window: Browser) -> Browser:
    """The English page, newly opened."""
    window.open(sites["en"].ready().url)
    window.find("#chat-seed input")
    return window


@pytest.fixture
def chinese(sites: dict[str, Site], window: Browser) -> Browser:
    """The Chinese page, newly opened behind its password."""
    site = sites["zh"].ready()
    window.open(f"{site.url}/login_check")
    form = urllib.parse.urlencode({"username": "mini_qwen", "password": PASSWORD})
    header = {"Content-Type": "application/x-www-form-urlencoded"}
    script = (
        "return fetch('/login', {method: 'POST', headers: arguments[1], body: arguments[0]}).then(got => got.status)"
    )
    assert window.run(script, form, header) == 200
    window.open(site.url)
    window.find("#chat-seed input")
    return window


def choose(browser: Browser, menu: str, option: str) -> None:
    """Choose from a drop-down list."""
    browser.click(f"{menu} input")
    browser.wait(
        lambda: browser.run(
            "const options = [...document.querySelectorAll('[role=option]')];"
            "const found = options.find(option => option.textContent.includes(arguments[0]));"
            "found?.dispatchEvent(new MouseEvent('mousedown', {bubbles: true})); return !!found",
            option,
        ),
        f"{option} in {menu}",
    )
    browser.wait(lambda: browser.value(f"{menu} input") == option, f"{option} to be chosen")


def send(browser: Browser, question: str, **settings: float) -> None:
    for name, value in settings.items():
        browser.write(f"#chat-{name} input[type=number]", str(value))
    browser.write("#chat-question textarea", question)
    browser.click("#chat-send")


def wait_for_end(browser: Browser, answers: int = 1) -> str:
    browser.wait(
        lambda: browser.count("#chat-talk .reply") == answers and browser.enabled("#chat-send"),
        "the end of the answer",
    )
    return browser.text("#chat-talk .reply:last-child .said")


def open_arena(browser: Browser, blind: bool) -> None:
    browser.run("[...document.querySelectorAll('[role=tab]')].at(-1).click()")
    browser.find("#arena-ask")
    if not blind:
        browser.click("#arena-blind input")


def ask_all(browser: Browser, question: str) -> None:
    browser.write("#arena-question textarea", question)
    browser.click("#arena-ask")


def test_an_answer_streams_and_ends_with_its_rate(english: Browser) -> None:
    send(english, "Where does Anna live?", max_new_tokens=300)
    lengths = []

    def look() -> bool:
        lengths.append(len(english.text("#chat-talk .reply .said")))
        return english.text("#chat-talk .note").endswith("limit")

    english.wait(look, "the end of the answer")
    assert lengths == sorted(lengths) and len(set(lengths)) > 3
    wait_for_end(english)
    assert english.text("#chat-talk .asked") == "Where does Anna live?"
    assert re.search(r"300 tokens · [\d.]+ tokens/s · [\d.]+ s · seed 0 · cut off", english.text("#chat-talk .note"))
    assert english.value("#chat-question textarea") == ""


def test_enter_sends_and_a_conversation_goes_on(english: Browser, scripted: ScriptedServer) -> None:
    choose(english, "#chat-model", f"echo (127.0.0.1:{scripted.server_port})")
    english.write("#chat-system textarea", "be brief")
    english.write("#chat-question textarea", "one\ue008\ue007\ue000two\ue007")  # Shift+Enter, then Enter
    assert wait_for_end(english) == "You said: one\ntwo"
    send(english, "three")
    assert wait_for_end(english, 2) == "You said: three"
    turns = [(turn["role"], turn["content"]) for turn in scripted.requests[-1][2]["messages"]]
    first = [("user", "one\ntwo"), ("assistant", "You said: one\ntwo")]
    assert turns == [("system", "be brief"), *first, ("user", "three")]
    english.click("#chat-clear")
    english.wait(lambda: english.count("#chat-talk .reply") == 0, "an empty page")
    send(english, "four")
    assert wait_for_end(english) == "You said: four"
    assert len(scripted.requests[-1][2]["messages"]) == 2


def test_stop_ends_a_long_answer_in_the_middle(english: Browser) -> None:
    send(english, "Go on for ever", max_new_tokens=8000)
    english.wait(lambda: len(english.text("#chat-talk .reply .said")) > 20, "some text")
    english.click("#chat-stop")
    stopped = wait_for_end(english)
    note = english.text("#chat-talk .note")
    assert note.endswith("stopped") and int(re.match(r"[\d,]+", note)[0].replace(",", "")) < 8000
    english.click("#chat-retry")
    english.wait(lambda: english.enabled("#chat-stop"), "a new answer")
    english.wait(lambda: len(english.text("#chat-talk .reply .said")) > 20, "some text")
    english.click("#chat-stop")
    assert stopped[:20] in wait_for_end(english)


def test_retry_gives_the_same_answer_and_another_seed_another(english: Browser) -> None:
    send(english, "Anna", max_new_tokens=60, temperature=1.5, seed=5)
    answers = [wait_for_end(english)]
    for seed in (6, 5):
        english.write("#chat-seed input", str(seed))
        english.click("#chat-retry")
        english.wait_text("#chat-talk .note", f"seed {seed}")
        answers.append(wait_for_end(english))
    assert answers[0] == answers[2] != answers[1]
    assert english.count("#chat-talk .reply") == 1


def test_a_pretrained_checkpoint_continues_raw_text(english: Browser, scripted: ScriptedServer) -> None:
    raw = "#chat-raw input"
    assert not english.run("return document.querySelector(arguments[0]).checked", raw)
    choose(english, "#chat-model", "pt")
    english.wait(lambda: english.run("return document.querySelector(arguments[0]).checked", raw), "raw text")
    assert not english.enabled(raw)
    send(english, "Anna lives", max_new_tokens=20)
    assert wait_for_end(english).startswith("Anna lives") and english.count("#chat-talk .asked") == 0
    choose(english, "#chat-model", f"echo (127.0.0.1:{scripted.server_port})")
    english.wait(lambda: english.enabled(raw), "a choice")
    english.click(raw)
    send(english, "Anna keeps")
    english.wait_text("#chat-talk", "Anna keepsYou said: Anna keeps")
    assert scripted.requests[-1][0] == "/v1/completions"


def test_a_blind_vote_is_kept_and_reveals_the_names(english: Browser, sites: dict[str, Site]) -> None:
    open_arena(english, blind=True)
    english.wait(lambda: re.search("no votes yet|Won", english.text("#arena-scores")), "the scores")
    votes_before = len(read_votes(sites["en"].votes)[0])
    choose(english, "#arena-presets", "Anna's animal")
    english.wait(lambda: english.value("#arena-question textarea").startswith("Please tell"), "the preset")
    ask_all(english, "Who are you?")
    letters = "ABCD"
    english.wait(lambda: english.enabled("#arena-vote-4"), "the end of all answers")
    heads = [english.text(f"#arena-{letter} .head") for letter in letters]
    assert heads == [f"Model {letter}" for letter in letters]
    columns = [english.text(f"#arena-{letter}") for letter in letters]
    assert not re.search(r"127\.0\.0\.1|tokens/s|sft|gone", "".join(columns))
    echo = next(number for number, column in enumerate(columns) if "You said: Who are you?" in column)
    (failed,) = [number for number, column in enumerate(columns) if "Failed." in column]
    assert not english.enabled(f"#arena-vote-{failed}")
    english.click(f"#arena-vote-{echo}")
    english.wait_text("#arena-verdict", f"The vote is kept: {letters[echo]}, echo (127.0.0.1")
    assert "echo (127.0.0.1" in english.text(f"#arena-{letters[echo]} .head")
    assert "cannot be reached" in english.text(f"#arena-{letters[failed]}")
    assert not any(english.enabled(f"#arena-vote-{number}") for number in range(6))
    english.wait_text("#arena-scores tr:nth-child(2)", "echo (127.0.0.1")
    votes, num_broken = read_votes(sites["en"].votes)
    assert (len(votes), num_broken) == (votes_before + 1, 0)
    vote = votes[-1]
    assert (vote.prompt, vote.blind, vote.verdict) == ("Who are you?", True, "better")
    assert vote.winner == vote.answers[echo].model and vote.winner.startswith("echo")
    assert vote.answers[echo].text == "You said: Who are you?"
    assert [answer.error is not None for answer in vote.answers] == [number == failed for number in range(4)]
    assert {answer.model: answer.raw for answer in vote.answers}["pt"]


def test_with_open_eyes_names_and_failures_stand_at_once(english: Browser, sites: dict[str, Site]) -> None:
    open_arena(english, blind=False)
    ask_all(english, "小雪住在哪里？")
    english.wait_text("#arena-D .failure", "cannot be reached")  # while others may still be speaking
    english.wait_text("#arena-C .said", "You said: 小雪住在哪里？")
    english.wait(lambda: english.enabled("#arena-vote-4"), "the end of all answers")
    heads = [english.text(f"#arena-{letter} .head").split(" (")[0] for letter in "ABC"]
    assert heads == ["A · sft", "B · pt", "C · echo"]
    assert all("tokens/s" in english.text(f"#arena-{letter} .note") for letter in "ABC")
    english.click("#arena-vote-4")
    english.wait_text("#arena-verdict", "The vote is kept: Tie.")
    vote = read_votes(sites["en"].votes)[0][-1]
    assert (vote.verdict, vote.winner, vote.blind) == ("tie", None, False)


def test_all_stream_together_and_stop_together(english: Browser) -> None:
    english.run("[...document.querySelectorAll('[role=tab]')].at(-1).click()")
    english.click("#arena-settings button")
    english.write("#arena-max_new_tokens input[type=number]", "8000")
    english.click("#arena-blind input")
    ask_all(english, "Go on")
    english.wait(lambda: all(len(english.text(f"#arena-{one} .said")) > 10 for one in "AB"), "both to speak")
    assert not english.enabled("#arena-vote-4")
    english.click("#arena-stop")
    english.wait(lambda: english.enabled("#arena-vote-4"), "the end")
    assert all(english.text(f"#arena-{one} .note").endswith("stopped") for one in "AB")


def test_a_chinese_page_and_whatever_is_said_is_text(chinese: Browser, sites: dict[str, Site]) -> None:
    for word in ("聊天", "竞技场", "温度", "系统提示词", "发送", "停止", "重试", "清空", "随机种子"):
        chinese.wait(lambda: word in chinese.run("return document.body.innerText"), word)  # noqa: B023
    send(chinese, HOSTILE.replace("\n", " "))
    assert wait_for_end(chinese) == HOSTILE
    assert re.search(r"\d+ 个词元 · 每秒 [\d.]+ 个 · [\d.]+ 秒", chinese.text("#chat-talk .note"))
    assert chinese.text("#chat-talk .asked") == HOSTILE.replace("\n", " ")
    open_arena(chinese, blind=False)
    ask_all(chinese, "你是谁？")
    chinese.wait_text("#arena-A .said", HOSTILE)
    chinese.wait_text("#arena-B .said", "word word")
    chinese.click("#arena-stop")
    chinese.click("#arena-vote-0")
    chinese.wait_text("#arena-verdict", "投票已保存：A, hostile")
    chinese.wait_text("#arena-scores", "获胜")
    for place in ("#chat-talk", "#arena-A", "#arena-scores"):
        assert chinese.count(f"{place} :is(script, img, b, code)") == 0
    assert "taken" not in chinese.run("return document.title")
    assert read_votes(sites["zh"].votes)[0][-1].answers[0].text == HOSTILE


def test_leaving_the_page_stops_what_it_asked_for(chinese: Browser, scripted: ScriptedServer) -> None:
    scripted.hung_up.clear()
    choose(chinese, "#chat-model", f"endless (127.0.0.1:{scripted.server_port})")
    send(chinese, "x")
    chinese.wait_text("#chat-talk .reply", "word word")
    assert not scripted.hung_up.is_set()
    chinese.open("about:blank")
    assert scripted.hung_up.wait(10)


@pytest.mark.parametrize("width", [390, 1240])
def test_nothing_is_wider_than_the_screen(english: Browser, width: int) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    english.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
    try:
        send(english, "unbroken" * 60, max_new_tokens=5)
        wait_for_end(english)
        for tab in range(2):
            english.run("document.querySelectorAll('[role=tab]')[arguments[0]].click()", tab)
            english.find("#arena-ask" if tab else "#chat-send")
            assert english.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        english.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})


def test_without_the_password_there_is_nothing(sites: dict[str, Site]) -> None:
    url = sites["zh"].ready().url

    def fetch(path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            with urllib.request.urlopen(url + path, data, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    assert fetch("/config")[0] == 401
    assert "hostile" not in fetch("/")[1]
    assert fetch("/login", {"username": "mini_qwen", "password": "wrong"})[0] == 400
    assert fetch("/login", {"username": "mini_qwen", "password": PASSWORD})[0] == 200
    assert PASSWORD not in sites["zh"].said


def test_page_and_program_call_nobody_else(english: Browser, sites: dict[str, Site]) -> None:
    """All that the browser has asked for in these tests, and all that the program has looked up or connected to."""
    open_arena(english, blind=True)
    english.run("return document.fonts.ready.then(() => true)")
    hosts = {urllib.parse.urlsplit(url).hostname for url in english.requested()}
    assert hosts == {"127.0.0.1"}
    for site in sites.values():
        called = site.ready().called.read_text().splitlines()
        assert called and all("127.0.0.1" in line for line in called), set(called)
        assert "Traceback" not in site.said
    request = urllib.request.urlopen(sites["en"].url, timeout=10)
    assert "default-src 'self'" in request.headers["Content-Security-Policy"]
    assert not re.search(r"""<(script|link)[^>]*(src|href)=["']?(https?:)?//""", request.read().decode())
