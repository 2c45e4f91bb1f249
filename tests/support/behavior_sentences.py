"""Sentences written for the tests, with the behaviours a reader sees in each; rules in docs/behaviors.md.

One sentence a line under the labels it has ("" for none). ``DEV`` may be looked at while a pattern is
written. ``TEST`` was written and labelled before the first pattern, and only measures. ``FRESH`` was written
after the last change of a pattern; docs/behaviors.md says what was measured when.
"""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Mapping

DEV: Mapping[str, str] = {
    "decomposition": r"""
Let me separate this into what happens before noon and what happens after.
The question really asks for two numbers.
Stage 2: find the interest for the second year.
We'll need the mean first and the variance afterwards.
Let's count the even numbers and the odd numbers separately.
To keep things organised I'll go room by room.
First up: how many litres does the tank hold?
So we have to handle the weekend and the weekdays differently.
Now we split the region along the line $y=x$.
The argument has two halves.
Next up is the number of buses.
Let me tackle the easy part first.
The calculation can be done in three stages.
There are two components to this cost: labour and material.
We treat adults first.
We can think of the journey as three legs.
To make it simpler, split 48 into 40 and 8.
Let's count the outcomes with exactly one head, then those with exactly two heads.
Let's tackle the numerator first.
We need to figure out three things.
Let me start with the cost of the books.
I will calculate each person's share one after the other.
First off, what's the area of the big rectangle?
As a first step, compute the discount.
The next step is to calculate the remaining distance.
Now, let's find the number of red marbles.
We consider three possibilities.
Either $x$ is positive or it is negative; we look at both.
Let's set intermediate targets: the weekly income, the weekly costs and the savings.
For the first half of the trip, we need the time; for the second half as well.
The total can be split as fixed cost plus variable cost.
(1) Find the slope. (2) Find the intercept.
Breaking the shape up into rectangles, we get two pieces.
Let's decompose the problem.
We will solve this by first finding the radius and then using it to get the volume.
First I need to know how many weeks there are in 84 days.
Before anything else, compute the number of working days.
We split into cases according to the value of $k$ mod 3.
We'll approach this in steps.
Let me break this down.
Breaking this down: the first 3 hours cost $5 each.
To make this manageable, I'll look at the ferry cost and the hotel cost independently.
Let's first determine the slope, then use the point to get the intercept.
First, let me find the value of a.
First, find the number of boys; then find the number of girls.
Next, let's compute the area of the inner circle.
Then calculate how many she has left: 20 - 8 = 12.
Now let's move on to the second part: the number of blue marbles.
We can split the sum into even and odd indices.
The problem can be broken down into two parts.
Let's consider each case separately.
Step one: determine the base price.
Step 1 is to find the total weight.
The first step is to find the radius of the circle.
I need to find two things: the number of cars and the number of wheels.
So the first sub-goal is to isolate y.
Let's list out the subtasks.
Let's divide the day into morning, afternoon and evening.
There are three scenarios.
We'll treat the cases a = 0 and a ≠ 0.
If $x \geq 0$ we get one equation and if $x<0$ another, so we do casework.
**Part 1: Cost of the adult tickets**
a) Compute the volume of the tank.
(i) Find the common ratio.
To begin, calculate the number of tiles in each row.
Start by finding the price of one pencil.
Begin with the number of eggs per day, and after that handle the sales.
Once we have the radius, we can compute the circumference and then the cost.
After finding the speed, we will find the time.
Let's do it step by step: first the cost of food, then the cost of drinks.
Let's organize the work: (a) total income, (b) total expenses.
Our strategy will be to compute the total area, then subtract the unshaded region.
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
Let me plug the numbers in again to see whether they agree.
Going back to the statement, 3 boxes of 12 do give 36 pens.
I'll check the edge case $n = 0$ too: it gives 1, fine.
This is the right order of magnitude.
Adding the pieces gives 24, exactly the length of the rope.
The result is positive, as a distance should be.
Does it hold for $n=2$?
A quick computation confirms it.
So our guess was right.
Let's test the answer against the story.
Comparing with the first method, we see the same value.
Reading the conditions once more: all three hold.
Let's do a sanity check on that.
To check this, multiply 12 by 9 to get 108.
Let me quickly verify with actual numbers.
Plug in: 4 + 2*3 = 10. Correct.
So 3 * 17 = 51, yes.
Confirming: 100 - 37 = 63.
That gives 20, which is right.
And that is indeed less than 50.
This agrees with our earlier estimate.
I should double check whether I included the tip.
Is this answer reasonable?
Let me count again: 1, 2, 3, 4, 5.
The answer passes the test.
Now verify the second condition: 5 > 3, true.
Trying x = 7 in the equation: 49 - 7 = 42, works.
When x = 2, the left-hand side equals 8, the same as the right-hand side.
To be sure about this, I compute 450 / 9 = 50.
So the solution set is valid.
Adding 17 and 25 gives 42, so our subtraction is right.
Our result is consistent with the graph.
Let me validate: 6 weeks times 7 days is 42.
It adds up: 12 + 18 = 30.
We have to check that $x=5$ is not excluded by the domain.
So yes, 144 is correct.
The dimensions are consistent.
Let me check my arithmetic.
Let's check our work.
Let me verify this result.
Let me verify by substituting back.
Verify: 3 + 4 = 7.
Verifying: 5(2) + 3 = 13.
Let's test this with a small case.
Let's see if that works: 2(5) + 3(4) = 22, correct.
Substituting x = 3: 2(3) + 1 = 7, which is correct.
Substituting these back into both equations confirms the solution.
This is consistent with the given information.
The total is 24, which matches the problem.
This checks out.
That checks out with the given ratio.
Yes, that's correct.
So the answer of 18 seems right.
Double checking: 12 * 12 = 144.
I'll double-check the arithmetic.
Just to confirm, 7 * 8 = 56.
Does that make sense?
Let me make sure I haven't missed any cases.
We should verify that x = 2 doesn't make the denominator zero.
Adding them up: 10 + 20 + 30 = 60, which is what we expected.
Let's plug these numbers back into the original problem.
If I add 5 and 13 I get 18, so the subtraction was correct.
Checking with the original equation: 2*4 - 3 = 5, true.
Since 6^2 = 36 and 36 + 64 = 100, the triple 6, 8, 10 checks.
Both conditions are satisfied.
All the conditions of the problem are met.
Thus our answer is correct.
To validate this, count the rows by hand.
We can cross-check using the other formula.
And the sum is 5 + 6 + 7 = 18, as given.
Let me run through the numbers again to be sure.
Proof check: 5 apples at $2 is $10, and 10 + 4 = 14, which equals the total.
The ratio 6:9 simplifies to 2:3, as it should.
Let me plug in x = 4 to see if it holds.
It's worth checking whether the solution is positive.
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
Ugh, I added when I needed to subtract.
Let me look at this from another angle.
Hmm, I don't think that's right.
That would be more than the whole class, so I must have misunderstood something.
Okay, new plan.
Let me throw that away.
This can't be, since she only has 10 coins.
Well, that was the wrong formula.
Hmm, maybe not.
I take that back: it is a combination.
Since this is going nowhere, I turn to coordinates.
Wait, does the fee apply to both days?
Wait a minute, that would mean he paid twice.
Wait, is that per person?
Hmm, but that ignores the holiday.
Oh, I see the problem: I forgot to convert to metres.
But hold on a second.
I think I misinterpreted "at least".
I need to correct my earlier step.
That was a mistake.
This leads to a contradiction, so I need another approach.
Let's discard that idea.
OK, forget that; let's use vectors.
This path is a dead end.
It seems I made an arithmetic error.
No, that can't be it.
Hmm, that's not an integer, so I must have done something wrong.
Let me go back to the equation and solve it differently.
Alternatively, maybe I should consider complementary counting, because this is too long.
That is not possible, so our assumption was incorrect.
Maybe I should start again.
I was going to use Vieta, but that doesn't help here.
Hmm no.
Actually, hmm, the order matters here, so it's permutations, not combinations.
Let me try that again.
I should have multiplied, not divided.
Trying 12: too big. Let's try 10 instead.
The guess of 30 fails, so try 29.
So this method is not going to work.
Ah wait, 15 is the number of girls.
Wait, that's not right.
Wait, let me recalculate.
Wait, but the problem says she sold half.
Hmm, this doesn't seem right.
Hmm, wait.
But wait, we haven't accounted for tax.
Oh no, I used 12 instead of 21.
Actually, I think I misread that.
Actually, that's not correct.
Actually, let me reconsider.
Let me reconsider the problem.
Let me re-read the question.
Let's step back.
Let me backtrack.
This approach isn't working.
That didn't work.
That doesn't work because the total would exceed 50.
This is a dead end.
No, that doesn't work either.
I need to try something different.
Let's try a different method.
Perhaps a better way is to use complementary counting.
Let's abandon this and use coordinates.
I realize I made an error in step 2.
I see my error: I forgot to carry the 1.
I think there is a mistake in my calculation.
There's an error in the previous step.
So my earlier answer was wrong.
So my previous calculation was incorrect.
Instead, let's use the law of sines.
Alternatively, since that failed, use substitution.
That gives a negative length, which is impossible, so let me go back.
Going back to the start, the train left at 9, not 10.
Let me fix that: 7 * 8 is 56, not 54.
So it should be 56, not 54.
I got that wrong; the correct value is 12.
That is too large, so try 4.
x = 5 doesn't work, so try x = 6.
Not 12 but 21, I swapped the digits.
Hmm, maybe I should use a different approach.
Let me redo that step.
Oh wait, he also has to pay for the cab.
Let me correct that.
Okay, that's clearly wrong, since you can't have half a cow.
This assumption turns out to be false, so we return to the other case.
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
We'd know the height if we knew the volume.
What would make the expression divisible by 4?
Suppose we already had the answer $x$; then $x/2$ would have to be 8.
The last digit has to be 0 if the number is to be a multiple of 10.
To show the lines are parallel, we look for equal angles.
I need the number of hours, and for that I need the arrival time.
In order to finish by 6, he must leave at 4.
Let's reason backwards from the last move.
For equality to hold, both factors have to vanish.
It only takes the radius to get the area, so that is what we look for.
Undo each step: add 7, then halve.
To get the remaining amount we need to know what was spent.
To find how much she saved, I need to know what she earned.
In order to compute the tax, we need the taxable income.
What we're after is the volume, so we need the height.
To get the number of boys, we need to subtract, and for that we need the number of girls.
Working backwards: 20, then 10, then 5.
Let's start from the final answer and go backward.
To end up with an odd number, the last step must add an odd number.
We need x + y; it is enough to have both x and y.
To show the claim, it's enough to show that $f'>0$.
For 7 to divide n, the digit sum rule is no use; n must be 0 mod 7.
For the total to be 60, the third number must be 15.
If the area is to double, the side must be multiplied by root 2.
Thinking in reverse, before he paid the rent he had 900.
To know the profit per item we have to know the cost per item.
The question asks for the total, which means I need both halves.
To maximize the product, we need the factors to be equal.
To make 24 from 3, 3, 8, 8, I need a division giving 24.
So the task is to find k such that both conditions hold, which requires k to be even.
The only unknown left for the answer is the price of milk, so let's find it.
Therefore, we must determine the speed before we can find the time.
If I knew the radius I could find the area, so I look for the radius.
Since the final amount is 80 after a 20% discount, the original was 100.
To find the area, I need the length and the width.
To determine her total pay, we need to know how many hours she worked.
In order to find the average, we need the sum of all the scores.
We need to find the total cost, so we need the price of each item.
Working backwards from the final amount, he had $40 before lunch.
Let's work backward.
We work back from the answer.
Start from the end: 5 apples left.
If the final number is 10, then before subtracting 4 it must have been 14.
We want to show that n is even, so it is enough to show n^2 is even.
To get to 75, we need a number that divides 75, such as 15.
To reach 24, I could use 4 * 6.
To end with 100, the previous number must be 50.
What we need is the number of girls, which requires the total.
For the product to be zero, one of the factors must be zero.
For this equation to have a single root, the discriminant must vanish.
The goal is to get x alone, so we must remove the 5.
We know the end result, so reverse each operation.
Our target is 36, so we need two numbers multiplying to 36.
So all I need is the number of days.
Thus we need only find the last digit of 7^100.
To have 30 left over, she must have started with 55.
We want the remainder, which means we need the value of the product mod 9.
Ultimately we need the profit, and the profit depends on the cost and the revenue.
Since we want the largest n, we need the smallest divisor.
To conclude that f is injective, we have to show that f(a) = f(b) implies a = b.
In order to get 3 points, he'd need to win one game.
So what must the last digit be for this to be divisible by 5?
Backtracking from the total of 90, the last stop had 30 people.
The answer will be total minus used, so I need the total.
To do that, we need to know the price of a single pen.
Undoing the doubling gives 8.
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
To solve for the height, we must first find the base.
To find the total cost, we first need to find the cost of the pens.
In order to know how much is left, we need two things: what he earned and what he spent.
To get the answer I need first the width, then the area.
""",
    "backtracking verification": r"""
Let me check: 5 * 7 = 35, but it should be 36, so I made an error somewhere.
Plugging this back in gives 11 instead of 13, so this is not the solution.
""",
    "": r"""
The guard waits by the gate for 30 minutes.
He wrote a check for the rent.
First came Ana, then Ben.
She needs 40 points to pass to the next level.
The error bars are 2 units wide.
The part-time workers earn $12 an hour.
Lena tried on 5 hats.
The plane turned back after 200 km.
His plan is to walk 5 km a day.
Check-in opens at 6 a.m.
That leaves 40 - 15 = 25 stamps.
Dividing by 4 gives $x = 6$.
It works out to 15 dollars a person.
Every second step is painted red.
They must pay 20% tax.
The two cases weigh 30 kg together.
She finds 12 shells on the first day.
Actually, most of the guests were late.
He corrects 8 of the 10 answers.
Let's call the number of boys $b$.
To bake the cake, he needs to buy 3 more eggs.
The store takes back 4 of the shirts.
If $a = 3$, then $b = 9$.
Thus the probability is $\frac{3}{8}$.
He waits another 10 minutes.
She checks the oven twice.
A quick check-up costs $60.
He needs to find his keys.
They had to wait in line for 40 minutes.
Then he finds 5 coins.
First we have 3 apples.
The company splits the profit between 4 partners.
They divide the cake into 6 pieces.
Each case of wine costs 120 dollars.
The wrong key opened nothing.
She corrected 12 mistakes in the essay.
He forgot his lunch and spent $8.
Sam misread the clock and came 20 minutes late.
They tried 5 recipes.
She starts over every Monday with 10 pages.
The train goes back to the first station.
He gets back 15 dollars in change.
The bus needs to be at the station by 5.
To win the game, a world scores 21 points.
For 3 people to ride the bus costs 9 dollars.
To make 12 muffins, she uses 3 cups of flour.
She has to work 8 hours.
The correct option is (B).
This is a right triangle.
That is 5 more than before.
So the numbers are 3, 5, and 7.
Note that 12 is even.
We get x = 3 or x = -2.
So x = 3 and y = 4.
It follows that n is even.
Adding the two equations gives 2x = 10.
Substitute y = 2x into the second equation: x + 2x = 9.
Since he works 5 days, he earns 5 * 80 = 400.
Only 3 of the 5 machines work.
The new engine works well.
Half of 12 is 6.
This is the sum of an arithmetic series.
The second half of the game lasted 50 minutes.
The first half has 20 seats.
The task takes 3 hours.
After 3 hours, he has 40 pages left.
After finding 6 shells, she has 20 shells.
Next, he adds 3 spoons of sugar.
Now multiply 5 by 8 to get 40.
Then multiply the number of rows by the number of seats per row: 12 * 20 = 240.
Finally, add the two amounts: 30 + 45 = 75.
First add 12 and 30 to get 42.
In a right triangle, the square of the hypotenuse is the sum of the squares.
Tina made sense of 4 chapters.
The police verified 12 passports.
The matching socks cost 4 dollars.
Wait times at the clinic are 20 minutes.
The waiter checks the table.
The waiting room has 12 chairs.
She checked 4 bags at the airport.
The teacher checks 20 papers each hour.
He verified 30 accounts on Monday.
The first time he ran 3 miles.
First, he ran 3 miles, and then he walked 2 miles.
He first bought 5 apples and then 3 pears.
Next week she will earn 40 dollars.
Finally, he has 12 left.
Then he went back home.
They split the money into 3 equal parts.
He cut the rope into 4 pieces.
The cake was divided into 8 slices.
She needs 3 cups of flour to make a cake.
He needs to find 5 more coins.
To make lemonade she needs 4 lemons.
To get to school, he walks 2 miles.
The case contains 24 bottles.
In the first case there are 12 bottles and in the second 10.
The correct answer to question 5 is worth 3 points.
He made 3 mistakes on his test, so he scored 97.
She was wrong about the date.
He started over with 10 new cards.
Instead of 10 apples he bought 12.
She tried again and scored 15.
He actually needs 14 meters.
The goal of the fundraiser is 500 dollars.
The step is 20 cm high.
Part of the money, $30, is spent on food.
The test is worth 100 points.
He checks out 3 books each week.
Substituting x = 2 gives y = 5.
Substituting back, we get y = 5.
Therefore x = 4.
We know that the sum is 20.
Now we have 3x = 12.
The reasonable thing is to buy two.
It makes 20 cups per hour.
Both numbers are prime.
Which of these is a multiple of 3?
The tank works at half capacity.
Her work takes 8 hours, since she also drives.
It takes 4 days because it works slowly.
We have to pay 15 dollars.
He has to be at work by 9.
You need 3 tickets to ride.
For each student to get 2 pencils, 60 pencils are bought.
The total requires no more than 3 digits.
So they need to save 40 more dollars.
By the Pythagorean theorem, the hypotenuse is 5.
Using the distance formula, we get 13.
Let n be the number of sides.
Since a and b are positive, a + b is positive.
He is right on time.
The angle at B is right.
Turn right at the corner.
The error in the measurement is 2 cm.
He corrects his speed to 50 mph.
We then divide by 3 to get 12.
We find that x = 4.
Then we find x = 4.
First, note that 3 divides 12.
There are 2 cases of water left.
There are 3 steps to the porch.
He did 3 sets of 10 push-ups, one at a time.
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
First I find the rate of one worker, second I find the rate of the whole world.
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
The world won its first 4 matches.
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

FRESH: Mapping[str, str] = {
    "decomposition": r"""
Let's first work out how much water one pump delivers.
This can be solved in two steps.
Step 2: Find the number of pages left.
I'll split the bill into food and drinks.
Next, let's determine the cost of the tiles.
Case 3: both numbers are negative.
We need to do the months one by one.
The whole job falls into four parts.
First, we need the length of one side; second, the number of sides.
Let me break the distance into the flat part and the hill.
Start with the inner ring, then move on to the outer ring.
We'll look at the coefficients of each power on their own.
""",
    "verification": r"""
Let's check whether this is right: 8 * 7 = 56, yes.
Checking the result: 120 / 5 = 24.
If we plug $x=6$ into the equation we get 36 = 36, so it's correct.
I want to double-check the number of days in March.
The sum of the shares is 100%, as it must be.
Let me verify the second equation as well.
This is consistent with what the problem says.
To confirm, 45 minutes is three quarters of an hour.
Both sides are equal, so our solution is correct.
So 17 is prime indeed, and the answer stands.
Does that add up?
We see that $(4,1)$ fulfils both equations, so the pair is right.
""",
    "backtracking": r"""
Wait, I think I mixed up the two trains.
Hmm, that doesn't look right.
Let me start from scratch.
Oh wait, the price is per dozen.
That won't work, because there are only 7 seats.
I made a slip in the last line.
Let's go back to step 2.
Actually, the 20% is taken from the new price, so I have to redo this.
No, this is not correct.
Okay, this isn't getting anywhere; let me try with ratios.
I previously said 14, but it is 16.
So that approach fails.
""",
    "backward_chaining": r"""
To find the speed, we need to find the distance and the time.
We have to work backward from 32.
In order to get an even sum, the two numbers must have the same parity.
It is enough to look at the last two digits.
So to know the price of the set, we need the price of one chair.
For the two lines to be perpendicular, the product of the slopes must be -1.
What do we need for the surface area?
Our goal is $\cos x$, so we need the adjacent side.
To reach 60 with three equal steps, each step must be 20.
Before we can find the average, we have to know the total.
Hence it suffices to bound the second term.
She ended with 9 after spending half, so before that she must have had 18.
""",
    "": r"""
The dog waits outside for 10 minutes.
He needs 15 more bricks to finish.
The first bus leaves at 7.
He cashed a check for $90.
They corrected the price to $18.
The steps are 15 cm high.
We get 4 * 6 = 24.
Then she gave 3 to her sister.
So each child gets 5 sweets.
Using the quadratic formula, $x = 3$.
The back row has 14 seats.
To paint the wall, he uses 2 cans.
The wrong bus took them 8 km away.
Half of the cases are full.
Nina tries 3 different flavours.
The next term is 21.
His goal was 10 km, but he ran 8.
Let $h$ be the height of the cone.
The last part of the race is 3 km.
By the triangle inequality, $c < 7$.
He must be 18 to vote.
The working day has 8 hours.
That is 12 dollars for each ticket.
Therefore $x=4$.
""",
}
