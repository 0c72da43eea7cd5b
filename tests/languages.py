"""Small texts in several languages, made of a few hundred words each, and text that has no words at all."""

from __future__ import annotations

import random

WORDS = {
    "English": """the house stands near water and many people walk along its narrow streets every morning before they
        work because nobody remembers when bridges were built although some letters mention earlier winters""",
    "German": """der Bürgermeister über Straßenbahnhaltestellen und die Gemeinde beschloss gestern nach langer Beratung
        dass Schulkinder künftig früher fahren weil Grundstücksverkehrsgenehmigungszuständigkeit größere Wege öffnet""",
    "Arabic": """ذهب الولد إلى المدرسة في الصباح ثم عاد مع أصدقائه من السوق وكان الجو جميلا والكتاب على الطاولة بعد
        الظهر قال المعلم إن القراءة تفتح أبواب المعرفة لكل الناس حيث يسكنون قرب البحر""",
    "Japanese": """私 は が を に で と も 東京 学校 図書館 昨日 友達 新しい コンピューター データベース 読んだ
        行きました です ます 2020年 時々 ｶﾒﾗ 𠮷野家 AI 研究 ー 言葉 美しい 山 川 「 」 食べる 飲む
        走っている 思います""",
    "Chinese": """我 们 在 学校 图书馆 昨天 朋友 新的 电脑 数据库 使用 GPU 训练 模型 北京 2020 年 的 了 是 和 研究 语言
        山 水 吃饭 喝茶 跑步 觉得 因为 所以 如果 天气 今天 明天 非常 美丽 城市 历史""",
    "Thai": """ฉัน ไป โรงเรียน ที่ ห้องสมุด เมื่อวาน กับ เพื่อน ใหม่ คอมพิวเตอร์ อ่าน หนังสือ แล้ว ก็ กิน ข้าว ดื่ม น้ำ วิ่ง
        คิดว่า เพราะ ถ้า อากาศ วันนี้ พรุ่งนี้ สวยงาม เมือง ประวัติศาสตร์ ภูเขา แม่น้ำ ภาษา มาก""",
}
ENDINGS = {
    "English": ["", "s", "ed", "ing", "er", "ly"],
    "German": ["", "en", "er", "es", "lich", "ung"],
    "Arabic": ["", "ه", "ها", "ون", "ات", "ين"],
}
FULL_STOPS = {"Japanese": "。", "Chinese": "。", "Thai": " "}
LANGUAGES = (*WORDS, "DNA")


def texts_in(language: str, count: int = 150, seed: int = 0) -> list[str]:
    """Documents of some sentences each, the same for the same arguments; "DNA" is one long run of bases."""
    rng = random.Random(seed)
    if language == "DNA":
        genes = ["".join(rng.choices("ACGT", k=rng.randint(3, 9))) for _ in range(300)]
        return ["".join(rng.choices(genes, k=rng.randint(20, 60))) for _ in range(count // 2)]
    words = [word + ending for word in WORDS[language].split() for ending in ENDINGS.get(language, [""])]
    stop = FULL_STOPS.get(language, ". ")
    space = " " if language in ENDINGS else ""

    def sentence() -> str:
        return space.join(rng.choices(words, k=rng.randint(5, 25))) + stop

    return ["".join(sentence() for _ in range(rng.randint(2, 9))) for _ in range(count)]
