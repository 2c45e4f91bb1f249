"""Kinds of answers that users of other graders reported as misread: the right are paid, near misses not.

The conventions behind them are in docs/grading.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from empg_lite.rewards import Grader
from empg_lite.rewards.explain import explain

#: Kind, then ``= reward | gold | prediction`` where it earns 1, ``!`` where not; ``⏎`` is a line break.
ROWS = r"""
# thousands commas never stand inside brackets that hold parts
= math | (100,200) | \boxed{x=100, y=200}
= math | (100,200) | \boxed{y=200, x=100}
! math | (100,200) | \boxed{x=200, y=100}
! math | (100,200) | \boxed{x=100, t=200}
! math | [100,200] | \boxed{x=100, y=200}
! math | (4,112) | \boxed{4112}
! math | 10200 | \boxed{(10,200)}
! math | 10200 | The point is (10,200).
= math | (10,200) | The point is (10,200).
= math | 10200 | \boxed{10,200}
= math | 10200 | The total is 10,200.
= math | [-36,104] | -36 \le x \le 104
! math | [-36,104] | -36 \le x < 104
! math | [-36,104] | -36 \le x \le 105
= math | (4,112) | (x, y) = (4, 112)
! math | (4,112) | (x, y) = (112, 4)
= math | (2,12) \cup (12,102) | (12, 102) \cup (2, 12)
= math | \{-1,100\} | \{100,-1\}
! math | \{1,100\} | \boxed{1100}
= math | \{1,100\} | \boxed{1, 100}
= math | 12,345 | \boxed{12345}
! math | 12,345 | \boxed{(12,345)}
! math | \langle 1,200\rangle | \boxed{1200}
= math | (10000,5) | \boxed{(10,000, 5)}
! math | (1,200,300) | \boxed{1200300}
= math | (1,200,300) | \boxed{(1, 200, 300)}
= math | [100,200) | \boxed{[100, 200)}
= math | 1,000,000 | \boxed{1000000}
! math | f(1,200) | \boxed{f(1200)}
# signs, scale words, bounds and denials belong to the number beside them
! gsm8k | 42 | > 42
! gsm8k | 42 | So $x \ge 42$.
= gsm8k | 42 | The answer is <42>.
! gsm8k | 42 | It is almost 42.
= gsm8k | 42 | It is about 42.
= gsm8k | 42 | That makes 42 instead of 40.
! gsm8k | 40 | That makes 42 instead of 40.
= gsm8k | 42 | The answer is 42 out of 50.
! gsm8k | 50 | The answer is 42 out of 50.
= gsm8k | 5 | It went down from 8 to 5.
= gsm8k | -5 | He owes $5, so his balance is -$5
= gsm8k | 24 | two dozen
= gsm8k | 5 | The answer is five.
! gsm8k | 5 | The answer is fifty.
= math | \text{five} | \boxed{5}
! math | \text{five} | \boxed{-5}
= math | -205 | minus two hundred five
! math | 2 | two thirds
! math | 7 | five two
= gsm8k | -5 | his balance is -$5.
! gsm8k | 5 | his balance is -$5.
! gsm8k | 5 | It is minus 5 degrees.
= gsm8k | -5 | It is minus 5 degrees.
! gsm8k | 5 | The temperature was negative 5.
= math | -5 | The temperature is minus 5 degrees.
! gsm8k | 5 | The answer is -$5.
= gsm8k | -5 | The answer is -$5.
! gsm8k | 5 | The answer is minus five, that is -5.
= gsm8k | 15 | 20 minus 5 is 15
= gsm8k | 15 | 20 - $5 = $15
= gsm8k | 15 | He had $20 - $5 = $15.
! gsm8k | 70 | 70 thousand dollars
= gsm8k | 70000 | 70 thousand dollars
! gsm8k | 70 | His profit is $70k.
= gsm8k | 70000 | His profit is $70k.
= gsm8k | 70000 | The answer is $70k.
= gsm8k | 70000 | \boxed{70k}
! gsm8k | 70 | \boxed{70k}
= gsm8k | 70000 | #### $70K
! gsm8k | 70 | #### 70 thousand
= gsm8k | 70000 | #### 70 thousand
! gsm8k | 70 | #### 70 thousand dollars
= gsm8k | 1500000 | The answer is $1.5 million.
= gsm8k | 1500000 | The answer is 1.5M
! gsm8k | 1.5 | The answer is 1.5M
! math | 70 | \boxed{70} thousand
= math | 70000 | \boxed{70} thousand dollars
= math | 70000 | $70$ thousand
! math | 70 | $70$ thousand
= math | 14k | \boxed{14k}
! math | 14k | \boxed{14000}
= math | 2k | \boxed{k+k}
= gsm8k | 5 | He ran 5 km.
= gsm8k | 5 | It weighs 5 kg.
= gsm8k | 5 | It weighs 5kg.
! gsm8k | 42 | at least 42
! gsm8k | 42 | The answer is more than 42.
! gsm8k | 42 | The answer is less than 42.
! gsm8k | 42 | It cannot be 42.
! gsm8k | 42 | The answer cannot be 42.
! gsm8k | 42 | He needs at least 42 dollars.
! gsm8k | 42 | The answer is 42 or more.
! gsm8k | 42 | 42 apples or more.
! gsm8k | 42 | The answer is at most 42.
! gsm8k | 42 | The answer is no more than 42.
! gsm8k | 42 | The answer is fewer than 42 apples.
! gsm8k | 42 | The answer is over 42.
! gsm8k | 42 | The answer is under 42.
! gsm8k | 42 | The answer is up to 42.
! gsm8k | 42 | The answer is 42+.
! gsm8k | 42 | The answer is 42, or more
! gsm8k | 42 | The answer is 42 at least.
! gsm8k | 42 | The answer is 42 apples at most.
! gsm8k | 42 | The total isn't 42.
! gsm8k | 42 | It is not equal to 42.
! gsm8k | 42 | The answer is 41 or 42.
! gsm8k | 42 | The answer is between 40 and 42.
= gsm8k | 42 | The answer is 42 more than before.
= gsm8k | 42 | The total adds up to 42.
= gsm8k | 40 | It is 40, not 42.
! gsm8k | 42 | It is 40, not 42.
! math | 42 | at least $42$
! math | 42 | more than 42
! math | 42 | \boxed{\text{at least } 42}
! math | 42 | \boxed{>42}
! math | 42 | \boxed{\geq 42}
! math | 42 | \boxed{42\text{ or more}}
! math | 42 | \boxed{\text{less than }42}
! math | 42 | The answer is greater than $42$.
! math | 42 | The value cannot be $42$.
= math | 42 | The answer is exactly 42.
! math | 2\sqrt3 | at least 2\sqrt{3}
! math | 10 | at least 10\text{ units}
! math | 2\sqrt3 | The length is more than 2\sqrt{3}.
= math | 2\sqrt3 | The length is 2\sqrt{3}.
! math | 2\sqrt3 | The length is not 2\sqrt{3}.
= math | -2\sqrt3 | The value is minus 2\sqrt{3}.
= math | 42 | The answer is only 42.
! math | 42 | It must be at least $\boxed{42}$.
! math | 42 | at most \boxed{42}
! math | 42 | It is more than $\boxed{42}$.
! math | 42 | \boxed{42} or more
! math | 42 | It cannot be $\boxed{42}$.
= math | 42 | No number other than $\boxed{42}$ can work.
= math | 29 | It occurs between 23 and $\boxed{29}$.
= math | 73 | There are $\boxed{73}$ squares that hold 5 or more dots.
= math | 195 | So $\boxed{195}$ numbers have at least one 5.
= gsm8k | 195 | So there are 195 numbers with at least one five.
= gsm8k | 30 | There are 30 homes with two or more pets.
! gsm8k | 30 | There are 30 homes or more.
= math | -5 | $x = -\boxed{5}$
! math | 5 | $x = -\boxed{5}$
= math | -5 | The answer is minus $\boxed{5}$.
= math | 5 | $20 - 15 - \boxed{5}$
= math | 5 | - \boxed{5}
= math | -1-x | $y = -\boxed{1+x}$
! math | 1-x | $y = -\boxed{1+x}$
# an equation that ends in a value says that value
= math | 293 | \boxed{m+n=293}
! math | 293 | \boxed{m+n=294}
! math | 293 | \boxed{m+n>293}
! math | 293 | \boxed{m+n \ne 293}
! math | 293 | \boxed{293=m+n+k=294}
= math | 293 | m+n = 256+37 = 293
! math | 256 | m+n = 256+37 = 293
= math | 62 | \boxed{AB + CD = 62}
= math | 62 | \boxed{[ABC] = 62}
! math | 62 | \boxed{[ABC] = -62}
= math | \frac16 | \boxed{\Pr[X=1] = \frac16}
! math | 1 | \boxed{\Pr[X=1] = \frac16}
= math | \frac16 | \boxed{\cos\theta = \frac16}
! math | \frac16 | \boxed{\cos\theta = -\frac16}
= math | \frac{NO}{BO} = \frac{1}{\sqrt6} | \boxed{\frac{1}{\sqrt6}}
= math | \frac{NO}{BO} = \frac{1}{\sqrt6} | \boxed{\frac{\sqrt6}{6}}
! math | \frac{NO}{BO} = \frac{1}{\sqrt6} | \boxed{\frac{1}{\sqrt5}}
= math | AB + BC = 12 | \boxed{12}
= math | \cos\theta = \frac16 | \boxed{\frac16}
= math | P(A) = \frac16 | \boxed{\frac16}
! math | x^2+y^2=25 | \boxed{25}
! math | 2x+z=1 | \boxed{1}
! math | x+2y=3 | \boxed{3}
! math | 0 | \boxed{x^2-5x=0}
! math | 4 | x^2 = 5
= math | 5 | \boxed{5 = x}
= math | x=5 | \boxed{5 = x}
! math | 2x+1 | \boxed{3y=2x+1}
! math | 5 | \boxed{x = 5, y = 6}
= math | 10 | \boxed{\sum_{k=1}^4 k = 10}
= math | 10 | \boxed{1+2+3+4 = 10}
= math | \sqrt2 | \boxed{a + b = \sqrt{2}}
= math | 3+4i | \boxed{z+w = 3+4i}
! math | 3+4i | \boxed{z+w = 3-4i}
= math | [0,100) | \boxed{A \cup B = [0,100)}
# a mark after a finished sentence is punctuation; cheering is decoration
= math | 42 | $42$!
= math | 42 | #### 42!
= gsm8k | 42 | #### 42!
= math | 42 | 42 marbles!
! math | 42 | The answer is 43!
= math | 120 | \boxed{5!}
= math | 120 | $5!$
= math | 120 | The answer is $5!$.
= math | 120 | 5!
! math | 5 | \boxed{5!}
= math | n! | The answer is n!
= math | (n-1)! | The answer is (n-1)!
= math | 7!\cdot 3 | The answer is $7! \cdot 3$!
= math | 42 | 42 ✅
! math | 42 | The answer is 42 ❌
! math | 42 | The answer is 42 ✗
= math | 42 | The answer is 42! 🎉🎉
= math | 42 | 🎉 42
= math | 42 | \boxed{42 ✅}
= math | 42 | The answer is 42 ✔️.
# labels and emphasis
= math | 460 | Answer => 460
= gsm8k | 460 | --> 460
= math | 460 | ⇒ 460
! math | 460 | Answer > 460
= math | 460 | ==460==
= math | 460 | ~~461~~ 460
! math | 461 | ~~461~~ 460
= math | 460 | \boxed{\Large 460}
= math | 460 | \framebox{460}
! math | 460 | ==-460==
= math | 460 | \text{ANSWER: } \$460
! math | 460 | \text{ANSWER: } \$461
= math | 460 | \[ \text{The answer is } 460 \]
= math | 460 | <b>460</b>
= math | 460 | \underline{460}
= math | 460 | __460__
= math | 460 | So the total is __460__ dollars.
= math | 460 | The answer is <strong>460</strong>.
= math | -460 | <b>-460</b>
! math | 460 | <b>-460</b>
= math | 460 | \textbf{Answer: 460}
= math | 460 | \boxed{\textbf{460}}
= math | 460 | \boxed{\text{Answer: } 460}
= math | 460 | \boxed{\text{Answer: 460}}
= math | 460 | \boxed{\text{Answer: 460 dollars}}
! math | 460 | \boxed{\text{Answer: 461}}
= math | 460 | \boxed{\color{red}{460}}
= math | 460 | \boxed{\textcolor{blue}{460}}
= math | 460 | \mathbf{Answer: 460}
= math | 460 | **Answer**: **460**
= math | 460 | ***460***
= math | \text{Sunday} | \text{Answer: Sunday}
! math | \text{Sunday} | \boxed{\text{The day is Monday}}
# ratios and times in sentences
! gsm8k | 4 | The ratio is 3:4.
! math | 4 | The ratio is 3:4.
= math | 3:4 | The ratio is 3:4.
! math | 3:4 | The ratio is 4:3.
= math | 3:4 | The ratio of boys to girls is 3 to 4.
= math | 3:30 | The train arrives at 3:30.
= math | 3:30\text{ p.m.} | It arrives at 3:30 PM.
! math | 3:30\text{ p.m.} | It arrives at 3:30 AM.
! math | 30 | It arrives at 3:30 PM.
! gsm8k | 30 | It arrives at 3:30 PM.
= math | -5 | It dropped from 10 to -5.
# letters
= choice | B | <answer>B</answer>
! choice | B | <think>B</think><answer>A</answer>
= choice | B | A, C and D are too small. So it must be B.
! choice | B | So it cannot be B.
= choice | B | Let us go with B.
! choice | B | So it must be B or C.
= choice | A | The answer is A rather than B.
! choice | B | The answer is A rather than B.
= choice | A | The choice that fits is A.
= choice | A | 选项 A
= choice | B | 故选：B
= choice | B | 答案是B。
! choice | B | 不选B
= choice | A | The correct option is A, because 3 > 2.
! choice | B | The correct option is A, because 3 > 2.
= choice | A | The answer is option (A): 12
! choice | B | The answer is option (A): 12
! choice | A | The correct option is not A.
! choice | A | Option A is wrong.
= choice | B | Option A is wrong, so B is correct.
! choice | A | Option A is wrong, so B is correct.
= choice | A | A is correct.
! choice | A | A is not correct.
= choice | A | The correct choice is (A) 12.
= choice | A | My choice: A
! choice | A | The correct option is A or B.
= choice | A | Therefore, option (A) is the right answer.
= choice | A | The answer is A: twelve apples.
= choice | A | The correct letter is **A**.
= choice | A | Correct option: A) 12
! choice | A | Option A cannot be right.
# remarks, qualifiers, units, bases, packages
= math | 72 | 72 (seventy-two)
! math | 72 | 72 (base 8)
= math | 2516_8 | 2516_{(8)}
! math | 2516_8 | 2516_{(7)}
= math | 9.6 | 9.6 J/(kg·K)
= math | 9.6 | 9.6\, \frac{m}{s}
! math | 9.6 | 9.6\frac{m}{s}
= math | \frac{x}{2} | \frac{x}{2} \text{ for } x\in\mathbb{R}
! math | \frac{x}{2} | \frac{x}{3} \text{ for } x\in\mathbb{R}
= math | x^2 | y = x^2 \text{ where } x \in \mathbb{R}
= gsm8k | 72 | The answer is 72, in total, so the farmer earns that much.
! gsm8k | 71 | The answer is 72, in total, so the farmer earns that much.
= math | 72 | The answer is 72, rounded to the nearest ten.
! math | 72 | The answer is 72, minus tax.
! math | 72 | The answer is 72, at least.
! math | 72 | The answer is 72, if not more.
= math | f(x)=x+1 | f(x)=x+1 \text{ for all real } x
! math | f(x)=x+1 | f(x)=x+1 \text{ for all } x > 0
! math | f(x)=x+1 | f(x)=x-1 \text{ for all real } x
= math | f(x)=x+1 | f(x)=x+1, \text{ for every real number } x
= math | f(x)=x+1 | f(x)=x+1 \quad \forall x \in \mathbb{R}
! math | f(x)=0 | f(x)=0 \text{ for all positive } x
= math | 9.6 | \boxed{9.6\text{ kg}\cdot\text{m}^2}
= math | 9.6 | \boxed{9.6\ \Omega}
= math | 9.6 | \boxed{9.6\,\mathrm{k}\Omega}
= math | 9.6 | \boxed{9.6\ \mu\text{m}}
= math | 9.6 | \boxed{9.6 μm}
= math | 9.6 | \boxed{\SI{9.6}{\metre}}
! math | 9.7 | \boxed{\SI{9.6}{\metre}}
= math | -9.6 | \boxed{\SI{-9.6}{\metre\per\second}}
! math | 20 | \boxed{\SI{20}{\percent}}
= math | 20\% | \boxed{\SI{20}{\percent}}
= math | 9.6 | \boxed{9.6\ \text{m}\,\text{s}^{-1}}
= math | 9.6 | \boxed{9.6\,\text{m}\cdot\text{s}^{-2}}
= math | 9.6 | \boxed{9.6\ \text{J}/(\text{kg}\cdot\text{K})}
= math | 9.6 | \boxed{9.6\text{ N/m}^2}
! math | 9.6 | \boxed{-9.6\ \Omega}
! math | 9.6 | \boxed{9.6 x\Omega}
= math | 2516_8 | \boxed{2516}_8
= math | 2516_8 | \boxed{2516}_{8}
! math | 2516_8 | \boxed{2516}_7
= math | 2516_8 | 2516 \text{ (base 8)}
! math | 2516_8 | 2516 \text{ (base 7)}
= math | 2516_8 | 2516 base 8
= math | 2516_8 | 2516 in base 8
= math | 2516_8 | \boxed{2516_{\text{eight}}}
= math | 2516_8 | \boxed{(2516)_8}
! math | 2516_8 | \boxed{2517}_8
= math | 3\mathbf{i}+4\mathbf{j} | \boxed{3\hat{i}+4\hat{j}}
= math | 3\mathbf{i}+4\mathbf{j} | \boxed{3\hat{\imath}+4\hat{\jmath}}
! math | 3\mathbf{i}+4\mathbf{j} | \boxed{3\hat{i}-4\hat{j}}
= math | 3\mathbf{i}+4\mathbf{j} | \boxed{3\hat{\mathbf{i}}+4\hat{\mathbf{j}}}
= math | 60 | 60^o
! math | 61 | 60^o
= math | 20\% | 20 per cent
! math | 20\% | 21 per cent
! math | 20 | 20 per cent
= math | 1,2,\ldots,n | 1,2,...,n
= math | 1,2,\ldots,n | 1, 2, \dots, n
! math | 1,2,\ldots,n | 1,2,...,m
= gsm8k | 0.0012 | The answer is $1.2 \cdot 10^{-3}$.
! gsm8k | -3 | The answer is $1.2 \cdot 10^{-3}$.
= gsm8k | 0.0012 | It equals 1.2 x 10^-3.
# percent, echoed boxes, decimal commas beside a currency sign
= math | 29.5 | EUR 29,50
! math | 2950 | EUR 29,50
= math | 198\% | 198
! math | 198\% | 199
= math | 198\% | 1.98
! math | 198\% | -198
! math | 18 | 18\%
= math | 18\% | 0.18
! math | 18\% | 1800
= math | 20\%, 30\% | 20, 30
= math | 42 | \boxed{42}. Put the final answer in \boxed{}.
= math | 42 | \boxed{42}. As asked: \boxed{answer}
= math | 42 | \boxed{42} \boxed{\text{your answer}}
! math | 42 | \boxed{}
! math | 42 | \boxed{41} then \boxed{}
! math | 42 | \boxed{42}. Wait: \boxed{41} \boxed{}
= math | 29.5 | 29,50 €
= math | 29.5 | The price is 29,50 €.
= math | 29.5 | €29,50
= math | 29.5 | \boxed{29,50\text{ €}}
! math | 2950 | 29,50 €
= math | 1234.5 | 1.234,50 €
= math | 1200 | €1,200
= math | 29,50 | \boxed{29,50}
= math | (1,50) | \boxed{(1,50)}
! math | 3.14 | 3,14
= gsm8k | 29.5 | The answer is 29,50 €.
! gsm8k | 2950 | The answer is 29,50 €.
! gsm8k | 50 | The answer is 29,50 €.
# what a model says before and after its answer, in other languages, and letters beside mathematics
= math | 18 | The answer is 18<|im_end|>
! math | 18 | The answer is 19<|im_end|>
= gsm8k | 18 | 18</s>
= math | 18 | a [ANSWER] 17 [/ANSWER] [ANSWER] 18 [/ANSWER]
= math | 18 | <|begin_of_box|>18<|end_of_box|>
= math | 42 | <s>41</s> 42
! math | 41 | <del>41</del> 42
= math | \frac13 | $\frac{1}{3}$ (or approximately 0.333)
! math | 0.333 | $\frac{1}{3}$ (or approximately 0.333)
! math | 3 | The answer is 3 (or 4).
= math | 3/4 | The answer is 3/4 (or 0.75).
= math | DNE | \boxed{\text{does not exist}}
! math | 0 | \boxed{\text{does not exist}}
= choice | B | The answer is B<|im_end|>
! choice | B | The answer is C<|im_end|>
= math | 42 | The answer should be 42.
= math | 42 | The answer seems to be 42.
! math | 42 | The answer should not be 42.
= math | 42 | Die Antwort lautet 42.
= gsm8k | 42 | La respuesta final es 42.
! math | 42 | La respuesta no es 42.
! math | 42 | Die Antwort ist nicht 42.
! math | 42 | La réponse n'est pas 42.
= math | 42 | 答：42
= choice | C | Antwort:⏎⏎Antwort: C
= choice | C | Ответ: C
= choice | C | 정답: C
! choice | C | La respuesta no es C.
= gsm8k | 12 | 2*6=12⏎#### 12⏎⏎Question: Tom has 3 pens.⏎Answer: He has 3.⏎#### 3
! gsm8k | 3 | 2*6=12⏎#### 12⏎⏎Question: Tom has 3 pens.⏎Answer: He has 3.⏎#### 3
= math | 12 | So \boxed{12}.⏎⏎Problem: Find 1+1.⏎Solution: \boxed{2}
= gsm8k | 17 | Q: What is 3*4?⏎A: 12⏎Q: What is 12+5?⏎A: 17
= gsm8k | 17 | Question: how many are left?⏎#### 17
! gsm8k | 41 | The answer is 42.⏎Question: once more?⏎The answer is 41.
= choice | D | We need \boxed{\langle H\rangle \ll \Delta E}.⏎**Answer: D**
! choice | E | We need \boxed{\langle H\rangle \ll \Delta E}.⏎**Answer: D**
! choice | C | \boxed{B \text{ or } C}
= choice | B | I would pick B — a safe choice.
! choice | A | I would pick B — a safe choice.
! choice | A | A perfect answer cannot be found.
= math | 4\sqrt{2} | $4\sqrt(2)$
! math | 4 | $4\sqrt(2)$
= math | 22.2 | 22.2 C
! math | 22.2 | 22.2 x
# what stands in a plain sentence or in a box with words
= math | (2,4) | It is (2,4)!
= math | 12 | It is 12 more than before.
= math | 12 | That is 12 minutes less than the train takes.
! math | 12 | It is 13 more than before.
= math | (2,4) | The point is (2,4).
! math | 4 | The point is (2,4).
! math | (2,4) | The point is (4,2).
= math | \{1,2,3\} | Hence the result is \{3,2,1\}.
! math | \{1,2,3\} | Hence the result is \{3,2\}.
= math | [8.1,12.8] | It equals [8.1,12.8].
! math | [8.1,12.8] | It equals (8.1,12.8).
= math | -5/2 | The total is -2 1/2.
! math | 1/2 | The total is -2 1/2.
= math | 52_8 | The result is 52_{8}.
! math | 8 | The result is 52_{8}.
= math | 460 | It is $460$ per week!
= math | 27 | \boxed{The cost is \$27.00}
! math | 27 | \boxed{The cost is \$28.00}
= gsm8k | -5 | \boxed{His balance is negative 5 dollars}
! gsm8k | 5 | \boxed{His balance is negative 5 dollars}
! gsm8k | 5 | \boxed{The answer is not 5}
= math | 460 | \boxed{Result: 460}
= math | f(x)=0 | #### f(x) = 0 for all real x
# golds that announce, and the rest
= math | The answer is 14. | \boxed{14}
! math | The answer is 14. | \boxed{15}
= math | Answer: 14 | \boxed{14}
= math | A: 14 | \boxed{14}
! math | A: 14 | \boxed{15}
= math | A: (2,4) | \boxed{(2,4)}
= gsm8k | He has 14 left. | \boxed{14}
= math | 24 | 2 dozen eggs
! math | 2 | 2 dozen eggs
= math | 1,000 | \boxed{1 \text{ thousand}}
= gsm8k | 3 | He has 3 quarters.
! gsm8k | 5 | #### 5 squared
! math | 5 | The answer is 5 squared.
! math | 5 | The answer is 5 tenths.
! gsm8k | 5 | The answer is 5 tenths.
= gsm8k | 1200 | The total cost is $1,200.00!
= gsm8k | 42 | 42 😀
= gsm8k | 42 | The answer is 42 (forty-two)!
= math | \frac{1}{2} | The probability is 1/2!
= math | 30.25 | 30^\circ 15'
! math | 30.25 | 30^\circ 16'
! gsm8k | 348 | The range is 297–348.
! gsm8k | 10 | It takes 5-10 minutes.
= gsm8k | 42 | A total of 42.
! gsm8k | 42 | It costs under $42.
= math | 5 | The distance is 5 m.
"""


def _kinds() -> dict[str, list[tuple[bool, str, str, str]]]:
    kinds: dict[str, list[tuple[bool, str, str, str]]] = {}
    for line in ROWS.strip().splitlines():
        if line.startswith("# "):
            rows = kinds.setdefault(line[2:], [])
        else:
            spec, gold, prediction = line[2:].replace("⏎", "\n").split(" | ", 2)
            rows.append((line[0] == "=", spec, gold, prediction))
    return kinds


KINDS = _kinds()


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, time_limit=10.0) as shared_grader:
        yield shared_grader


def test_every_kind_has_both_directions() -> None:
    assert len(KINDS) == 12 and sum(map(len, KINDS.values())) >= 300
    for kind, rows in KINDS.items():
        assert {paid for paid, *_ in rows} == {True, False}, kind
    assert len({row[1:] for rows in KINDS.values() for row in rows}) == sum(map(len, KINDS.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_kind(grader: Grader, kind: str) -> None:
    rows = KINDS[kind]
    futures = [grader.submit(spec, (gold, prediction, None)) for _, spec, gold, prediction in rows]
    verdicts = [future.result() for future in futures]
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if (v.reward == 1) != row[0]]
    assert not wrong, wrong
    for (_, spec, gold, prediction), verdict in zip(rows, verdicts, strict=True):
        steps = explain(spec, gold, prediction, verdict=verdict)
        assert steps[-1].startswith(f"reward {verdict.reward:g}"), steps


@pytest.mark.parametrize("spec", ["math", "gsm8k"])
@pytest.mark.parametrize("number", ["7", "42", "1200", "0.5", "-18", "3/4"])
def test_what_changes_a_number_is_not_lost(grader: Grader, spec: str, number: str) -> None:
    """Plain wraps keep the verdict; a sign, scale word, bound or denial, announced or not, refuses it."""
    kept = [
        "The answer is {}!",
        "So it is {}.",
        "**{}** ✅",
        "<b>{}</b>",
        r"\text{{Answer: }} {}",
        "It is __{}__ 🎉",
    ]
    kept += [
        "Answer: {} eggs!",
        "The answer is {}, in all.",
        r"$\boxed{{{}}}$!",
        r"\[ \text{{The answer is }} {} \]",
    ]
    lost = [
        "minus {}",
        "negative {}",
        "{} thousand",
        "{} dozen eggs",
        "{} million",
        "at least {}",
        "at most {}",
    ]
    lost += [
        "more than {}",
        "less than {}",
        "not {}",
        "{} or more",
        "{} at most",
        "{}%",
        "{}k",
        "over {}",
        "{}1",
    ]
    right = [wrap.format(number) for wrap in kept]
    wrong = [
        f.format(word.format(number))
        for word in lost
        for f in ("The answer is {}.", "So it is {}.", "{}", "#### {}")
    ]
    verdicts = grader.grade_many(spec, [(number, text, None) for text in [*right, *wrong]])
    refused = [v for v in verdicts[: len(right)] if v.reward != 1]
    paid = [(text, v) for text, v in zip(wrong, verdicts[len(right) :], strict=True) if v.reward]
    assert not refused and not paid, (refused, paid)


def test_a_bound_that_the_problem_asks_for_may_be_repeated(grader: Grader) -> None:
    least, most = "What is the smallest number of coins?", "How many coins can he have at most?"
    for text, asking, paid in (
        (r"He has at least $\boxed{42}$ coins.", least, 1),
        (r"He has at least $\boxed{42}$ coins.", most, 0),
        (r"He has at least $\boxed{42}$ coins.", "How many coins has he, if at least one?", 0),
        (r"He has more than $\boxed{42}$ coins.", least, 0),
        ("He has at most 42 coins.", most, 1),
        ("He has at most 42 coins.", least, 0),
    ):
        assert grader.grade("math", "42", text, asking).reward == paid, (text, asking)


def test_a_scale_that_the_problem_asks_for_may_be_repeated(grader: Grader) -> None:
    asking = "How many dozen eggs does he need?"
    assert grader.grade("gsm8k", "2", "The answer is 2 dozen.", asking).reward == 1
    assert grader.grade("gsm8k", "2", "The answer is 2 dozen.", "How many eggs does he need?").reward == 0
    assert grader.grade("gsm8k", "3", "The answer is 2 dozen.", asking).reward == 0
    assert grader.grade("math", "70", "70 thousand", "How much is it, in thousands of dollars?").reward == 1
