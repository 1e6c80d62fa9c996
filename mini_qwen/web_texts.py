"""What the web page says, in English and in Chinese."""

import os
from dataclasses import dataclass

LETTERS = "ABCD"


@dataclass(frozen=True)
class Texts:
    chat: str = "Chat"
    arena: str = "Arena"
    model: str = "Model"
    question: str = "Question"
    question_hint: str = "Ask something. Enter sends, Shift+Enter begins a new line."
    system: str = "System prompt"
    presets: str = "Presets"
    send: str = "Send"
    stop: str = "Stop"
    retry: str = "Retry"
    clear: str = "Clear"
    settings: str = "Settings"
    temperature: str = "Temperature"
    top_p: str = "Top-p"
    top_k: str = "Top-k (0: all)"
    repetition_penalty: str = "Repetition penalty"
    max_new_tokens: str = "Length, in tokens"
    seed: str = "Seed (-1: another each time)"
    raw: str = "Continue raw text"
    nothing_said: str = "Nothing has been said yet."
    waiting: str = "…"
    rate: str = "{tokens:,} tokens · {rate:.1f} tokens/s · {seconds:.1f} s · seed {seed}"
    cancelled: str = "stopped"
    length: str = "cut off at the length limit"
    failed: str = "Failed: {error}"
    failed_hidden: str = "Failed. The reason is shown with the name, after the vote."
    needs_two: str = (
        "The arena needs two to four models. Start the page with more: checkpoints or URLs, one behind the other."
    )
    ask: str = "Ask all"
    blind: str = "Blind: no names until the vote"
    candidate: str = "Model {letter}"
    better: str = "{letter} is better"
    tie: str = "Tie"
    all_bad: str = "All bad"
    vote_hint: str = "Vote when all have answered."
    voted: str = "The vote is kept: {verdict}."
    not_kept: str = "The vote could not be kept: {error}. Vote again when there is room."
    scores: str = "Scores"
    no_votes: str = "There are no votes yet."
    columns: tuple[str, ...] = ("Model", "Score", "95% interval", "Votes", "Won")
    scores_note: str = (
        "Bradley-Terry scores, mean 1000; 400 points more are 10 : 1. The interval is shown from 10 votes on."
    )
    broken_lines: str = "Lines of the votes file that cannot be read: {number}."


ENGLISH = Texts()
CHINESE = Texts(
    chat="聊天",
    arena="竞技场",
    model="模型",
    question="问题",
    question_hint="请输入问题。回车发送，Shift+回车换行。",
    system="系统提示词",
    presets="预设问题",
    send="发送",
    stop="停止",
    retry="重试",
    clear="清空",
    settings="设置",
    temperature="温度",
    top_p="Top-p",
    top_k="Top-k（0：全部）",
    repetition_penalty="重复惩罚",
    max_new_tokens="长度（词元）",
    seed="随机种子（-1：每次不同）",
    raw="续写原文",
    nothing_said="还没有对话。",
    rate="{tokens:,} 个词元 · 每秒 {rate:.1f} 个 · {seconds:.1f} 秒 · 种子 {seed}",
    cancelled="已停止",
    length="达到最大长度，已截断",
    failed="出错：{error}",
    failed_hidden="出错。投票后与模型名称一起显示原因。",
    needs_two="竞技场需要两到四个模型。启动时请依次写出多个检查点或网址。",
    ask="全部提问",
    blind="盲测：投票前隐藏名称",
    candidate="模型 {letter}",
    better="{letter} 更好",
    tie="平局",
    all_bad="都不好",
    vote_hint="全部回答完毕后请投票。",
    voted="投票已保存：{verdict}。",
    not_kept="投票未能保存：{error}。有空间后请重新投票。",
    scores="得分",
    no_votes="还没有投票。",
    columns=("模型", "得分", "95% 区间", "票数", "获胜"),
    scores_note="Bradley-Terry 得分，平均 1000；高 400 分即胜率 10 : 1。满 10 票后显示区间。",
    broken_lines="投票文件中无法读取的行数：{number}。",
)


def choose_texts(language: str) -> Texts:
    """`zh`, `en`, or `auto`: Chinese where LC_ALL, LC_MESSAGES or LANG, the first of them that is set, is Chinese."""
    if language == "auto":
        named = [os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)]
        language = "zh" if named and named[0].lower().startswith("zh") else "en"
    return CHINESE if language == "zh" else ENGLISH
