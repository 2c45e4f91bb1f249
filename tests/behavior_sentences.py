"""Sentences written for the tests, with the behaviours a reader sees in each; rules in docs/behaviors.md.

One sentence a line under the labels it has ("" for none). ``DEV`` may be looked at while a pattern is
written. ``TEST`` was written and labelled before the first pattern, and only measures.
"""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Mapping

DEV: Mapping[str, str] = {
    "decomposition": r"""
First, let's find how many apples Tom picked in the morning.
Step 1: Work out the price of one notebook.
Step 3 - compute the total distance.
### Step 2: Find the number of boys
Let's split the trip into two legs: uphill and downhill.
We can break this problem into three smaller ones.
I'll handle the adults and the children separately.
There are two cases to consider, depending on the sign of $x-4$.
Case 2: $n$ is odd.
To solve this, I will first compute the area of the lawn and then subtract the pond.
Then we find the cost of the paint.
Next, I need to figure out how many hours she worked on Sunday.
The solution has three parts.
Let us do this in two stages: count the red cards, then count the face cards.
2. **Find the derivative**
1. Calculate the number of cookies per tray.
Subproblem 1: how many weeks are there in the period?
My plan: get the speed, get the time, multiply.
Divide the figure into a square and two triangles.
Ok so the problem has two unknowns i should get, first the daily pay and then the number of days.
We consider separately the terms with $i<j$ and the terms with $i>j$.
Finally, we calculate the profit.
Firstly, calculate the speed of the boat in still water.
""",
    "verification": r"""
Let me check: $4 \cdot 9 = 36$, yes.
Let's verify that: 18 + 24 = 42, which is the total we were given.
Plugging $x=2$ back in, $8-8=0$, so it works.
Check: 15 + 15 = 30 ✓
To double-check, add the parts again: 12 + 13 + 5 = 30.
This makes sense because the discounted price has to be lower than the original one.
Does this fit the condition? 7 + 8 = 15, yes it does.
We can confirm this by counting the days one by one.
Both values satisfy the original equation.
So the answer is reasonable.
Quick sanity check: the two angles add up to 180 degrees.
Let me recompute that to be sure.
Testing with $n=3$: $3^2-3=6$, as expected.
Verification: $2(5)+3=13$.
Indeed, $11^2 = 121$.
That matches the number given in the question.
Let me make sure I did that right.
Substituting $y=-1$ in the second equation, $3(-1)+5=2$, which holds.
I got 96 again, so I'm confident in it.
Is 40 plausible for a bus?
""",
    "backtracking": r"""
Wait, I forgot the return trip.
Hmm, that can't be right.
Actually no, the discount applies to the second item only.
Let me start over.
That approach gets messy, so let me try something else.
I made a mistake when adding the hours.
Oops, I should have divided by 4.
No, that's wrong.
Hold on, the question asks for minutes, not hours.
Let me go back and reread the problem.
This doesn't work, so let's try $n = 5$ instead.
Scratch that, she sold them before lunch.
On second thought, we should count both ends of the fence.
Factoring doesn't seem to help here, so let's use the quadratic formula instead.
wait no thats per week
I misread the question: he pays for three people.
Correction: the total is 54, not 45.
But that would give a negative number of cows, so my equation must be wrong.
Hmm, let me think again.
I was wrong to assume that the triangle is right-angled.
""",
    "backward_chaining": r"""
To find the profit, we need to know the cost and the revenue.
Let's work backwards from the 9 marbles he has left.
To get an average of 90, the four scores must add up to 360.
For the number to be divisible by 6, it has to be even.
It suffices to show that $a_n$ is bounded.
What do we need in order to find the height?
We want $2x+1$ to be 9, so $x$ should be 4.
In order for the box to close, the lid has to be at least 20 cm wide.
The problem reduces to finding the number of odd divisors.
Reversing the last step, before he doubled it he had 14.
The goal is the area, and for that we need the base and the height.
If she is to have 50 dollars at the end, she has to earn 18 more.
To prove the inequality it is enough to prove $(a-b)^2 \ge 0$.
To answer this, we must know how long the first train took.
Starting from the end: the last owner got 3 coins, so before him there were 6.
The total requires the number of chairs per row.
""",
    "decomposition backward_chaining": r"""
To find the total cost, we first need to find the cost of the pens.
In order to know how much is left, we need two things: what he earned and what he spent.
To get the answer I need first the width, then the area.
""",
    "backtracking verification": r"""
Let me check: 5 * 7 = 35, but it should be 36, so I made an error somewhere.
Plugging this back in gives 11 instead of 13, so this is not the solution.
""",
    "": r"""
Tom has 5 apples and buys 7 more, so he has 12 apples.
She wrote a $50 check to the landlord.
They wait 5 minutes for the bus.
The wait is 10 minutes in the afternoon.
On the first day he read 20 pages.
His first game lasted 40 minutes.
Then he drove back home at 60 km/h.
We need 5 eggs for the cake.
Substituting $x=3$ into the first equation gives $y=7$.
Mr. Wait has twice as many stamps as Ms. Stone.
He actually spent 30 dollars.
The inspector checks 40 bags every hour.
Please reason step by step, and put your final answer within \boxed{}.
Each step of the ladder is 25 cm high.
The wrong answers cost him 4 points.
She made 3 mistakes on the test.
First class tickets cost $300.
He works 8 hours a day.
The pattern repeats every 4 days.
To find the total, we add 3 and 5.
#### 42
So the answer is $\boxed{12}$.
\[x^2 - 5x + 6 = 0\]
The case holds 12 bottles.
In this case, the ball lands on red.
She takes a break of 15 minutes.
He pays back 20 dollars a month.
There are 3 steps between the floors.
Let $x$ be the number of girls.
We check the primes 2, 3, 5 and 7 in turn.
The cheque bounced.
By symmetry, $AB = AC$.
He tries 3 of the 8 flavours.
That makes 12 * 3 = <<12*3=36>>36 wheels.
The first term is 4 and the second is 9.
Let us tick the box for yes.
The match ended 3 to 2.
He needs 4 more points to win.
Multiply both sides by 6.
The number must be between 10 and 20.
Back at the shop, she sold 4 hats.
Verify that the sum of the angles of a triangle is 180 degrees.
He split the bill with his brother.
The waiter was wrong about the price.
Her goal is to save 200 dollars.
Now the water level is 30 cm.
The second part of the film takes 45 minutes.
The machine checks itself every hour.
Alternatively, we could use similar triangles.
The parts cost 40 dollars each.
Using the formula for the area of a triangle, we get 24.
He finally reached the top after 3 hours.
""",
}

TEST: Mapping[str, str] = {
    "decomposition": r"""
I'll tackle this one piece at a time, starting with the fuel.
Let's separate the integral over $[0,1]$ from the one over $[1,2]$.
First, figure out how many crates the truck can carry.
Step 4: Determine Maria's share.
**Step 2.** Solve for the number of dimes
Case 1. The two dice show the same face.
We distinguish two cases: $k$ even and $k$ odd.
We'll start by computing the price without tax, and after that we'll add the tax.
This question has two sub-questions, the length of the fence and what it costs.
Next, determine the number of ways to seat the remaining guests.
Then, let's calculate how much Dana spends on food.
First I find the rate of one worker, second I find the rate of the whole team.
Split the polygon into four congruent right triangles.
The computation breaks down into three pieces.
3. Compute the remaining balance:
Secondly, we find the volume of the cone.
Plan: (1) total of all tickets, (2) tickets of adults, (3) difference.
We deal with the positive and the negative values of $t$ separately.
ok lets do each month on its own and sum them up at the end
Let us treat the numerator and denominator one at a time.
Part A: total number of chairs in the hall
For the second part, we need the surface of the lid.
Let's decompose the fraction into partial fractions, $A/(x-1)$ and $B/(x+2)$, and integrate them one by one.
I will first count all arrangements and then remove those where the twins sit together.
This problem we can divide to two small problem.
The first thing to find is the perimeter of the garden.
Finally, find how much money each of the friends gets.
Suppose first that $p=2$; the odd primes are treated after that.
""",
    "verification": r"""
Let me double check this by adding the columns in the other order.
Checking our answer: $3 \cdot 14 - 2 = 40$, as required.
Plug it back: 6 * 6 + 4 = 40, good.
To be safe I will redo the multiplication: 17 * 6 = 102.
We verify: $\sqrt{49} + 1 = 8$.
As a check, the probabilities sum to $1/6+1/3+1/2=1$.
Since 45 + 55 = 100, the percentages add up correctly.
If we substitute $t=4$ into the original formula, we obtain 20, so the solution is correct.
Let me see if this is consistent with the total of 60: 24 + 36 = 60, yes.
This seems reasonable, since a half-full tank should last about two days.
Does $x=-1$ really satisfy the equation?
And 13 - 5 = 8 indeed, so the number of boys is right.
I want to verify my result with a small example.
One can easily check that $(2,3)$ is a solution.
Let me confirm the count by listing: 12, 21, 30.
The units work out too: km/h times h gives km.
Sanity-checking: 3 hours at 50 would be 150, close to our 145.
We test the result: for $n=1$ both sides equal 1.
Now check: does 7 + 9 + 4 give 20?
Yes, 5 nickels and 3 dimes do make 55 cents.
It agrees with what we found by the first method.
Looks right.
ans 84, verify 84 / 7 = 12 ok
So this root is extraneous, because it makes the left side negative.
Going through the calculation once more, I get the same 72.
So let's recheck the sum: 4+8+15 = 27.
The value $x = 3$ works since $27 - 9 = 18$.
We check that both of these points lie on the circle.
""",
    "backtracking": r"""
Hmm wait, the tank was already half full.
No wait, I counted Sunday twice.
This is getting too complicated; there must be an easier way, so let me think of the complement.
That's not what the question asks for.
Sorry, I mixed up the radius and the diameter.
That does not lead anywhere, so we go back to the original equation.
My mistake: there are 52 weeks, not 50.
Oh, I see, I used the wrong formula.
Let me redo this with the right number of seats.
This contradicts the given total, so my assumption about the price is wrong.
Let me try a different approach.
Let's try another way: use generating functions.
Instead of that, let me set up a system of equations.
Actually, wait, each box has 12 pens, not 10.
Actually, I need to include the delivery fee as well, I left it out.
Hmm, that gives 3.5 people, which is impossible, so something went wrong.
I think I made an error in the sign.
Ah, but I overlooked that 0 is also even.
The substitution $u = x^2$ leads nowhere.
Let me rethink the problem.
but this wrong because he eat only morning
Let's undo that and consider the other factor.
Hmm, not quite: the second machine starts an hour later.
We tried $k=3$ and it failed, so let's move on to $k=4$.
I should not have rounded there.
So induction on $n$ fails; we switch to induction on the degree.
Strike that.
""",
    "backward_chaining": r"""
To know how much change he gets, we must know the price of the three tickets.
Working backward, she had 16 before giving half away.
To reach 100 points, the last two throws together must be worth 35.
In order for $n^2+n$ to be divisible by 10, $n$ has to end in 0, 4, 5 or 9.
Hence it is enough to find the number of zeros of $f$.
To determine the area, we need to find the radius.
For the roots to be real, we need $b^2 \ge 4ac$.
We are asked for the speed, so we need the distance and the time.
The final result is 20, so the number before adding 6 must have been 14.
It is sufficient to prove that the two triangles are congruent.
If we want the product to be odd, every factor must be odd.
What would we need to know to compute the tip?
So the question becomes: how many of them are multiples of 7?
We undo the operations in reverse order: subtract 5 and then divide by 3.
The desired conclusion follows if we can show that $g$ is increasing.
To have at least 40 left on Friday, she can spend at most 60 before.
Therefore we only need to find $a+b$ to get the answer.
Before we can compute the interest we need the balance at the end of the year.
To calculate the total weight, one needs the weight of one brick.
The target is 24, so we look for two numbers whose product is 24.
To pay it off in a year, Ann would need to put aside 150 dollars each month.
How can we obtain $\sin 15^\circ$? If we know $\sin 45^\circ$ and $\sin 30^\circ$, we can.
""",
    "backward_chaining decomposition": r"""
To find how many pages remain, we first have to find how many she read in each of the two weeks.
To calculate the fare I need two things: the distance and the price per km.
Before finding the answer, we should first know the number of students in each class.
""",
    "backtracking verification": r"""
Checking: $2^5 = 32 \neq 36$, so that's wrong, let me redo it.
When I put 8 back into the equation the two sides differ, so I must have slipped somewhere.
Let me verify: 3 * 15 = 45, hmm, that is not 54.
""",
    "": r"""
Sara sold 14 cups of lemonade at $2 each for a total of 14*2 = $<<14*2=28>>28.
The checkout line has 8 people in it.
The customers had to wait for 25 minutes.
After a long wait, the train left at 9 p.m.
She came back with 6 more eggs.
The first three numbers are 2, 5 and 8.
This is his first try at the game.
The check for dinner was $84, and they left a 20% tip.
A taxi needs 12 minutes to reach the airport.
He needs to buy 6 boxes.
Substituting this into (2), we obtain $3y = 12$.
Plugging in the numbers gives $V = 36\pi$.
The checkered cloth is 3 m long.
Cases of soda hold 24 cans.
A suitcase costs $45.
Mrs. Check bakes 30 rolls.
She actually has 12 cousins.
The error of the scale is 2 grams.
He got 4 questions wrong out of 20.
You may verify your ticket at the counter before 6 pm.
Let's think step by step.
The recipe requires 3 cups of flour.
The team won its first 4 matches.
First place wins $500 and second place wins $300.
The back wheel has 28 spokes.
He went back to the store and bought 2 more.
To make one cake, he uses 3 eggs.
To get $x$, divide both sides by 4.
$f(3) = 9 - 3 = 6$.
Thus $\triangle ABC \sim \triangle DEF$.
\begin{align*} a &= 2 \\ b &= 3 \end{align*}
Let $d$ denote the distance in miles.
The store had a 20% off sale, so each shirt was $16.
The next day he ran 4 km more.
Then she added 3 cups of water.
They each take a different approach to saving.
The instructor corrects 15 essays an hour.
The test has 40 questions.
The tests cost 15 dollars each.
Let us check the box that says 18 to 25.
The guard checks every door twice a night.
An alternative route is 12 km long.
The reverse side of the card is blue.
The broken machine does not work on Monday.
Because the lines are parallel, the angles are equal.
Therefore there are $\binom{5}{2}=10$ handshakes.
The final step is 15 cm higher than the others.
Half of the parts were sent to the second plant.
The stairs have two parts with 9 steps each.
We have $n \equiv 2 \pmod 5$.
Since $x$ must be positive, $x = 5$.
His last attempt failed by 2 cm.
She tried to sell 30 tickets.
Simplify the left side: $6x - 4$.
That leaves 18 - 7 = 11 stickers.
This is the case for 3 out of 5 students.
The number of students who must repeat the class is 4.
Hence $2a = 14$ and $a = 7$.
A: 35
The wrong turn added 8 km to the trip.
We now use the law of cosines.
The shop is closed, and instead he buys 2 cakes at the market.
The scale must be reset after 50 uses.
If the first number is $n$, then the second one is $n+1$.
He saved enough to buy a bike for $120.
In total, the job required 45 hours.
Note that $\log_2 8 = 3$.
The answer is 64 square inches.
So they wait, in all, 3 + 4 = 7 minutes.
Each check is for $20, so 5 checks are worth $100.
All of it matches his shoes, so he buys 3 pairs.
She breaks the chocolate into 8 pieces and eats 2.
The reasonable price of $15 attracted 40 buyers.
The correct change is $3.25.
The plan costs $30 a month.
""",
}
